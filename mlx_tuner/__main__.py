from mlx_tuner.cli import main

main()
