"""Rows of a training file: found, checked, tokenised, put into an order, streamed."""
