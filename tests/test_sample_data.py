"""The sample data: well-formed rows whose answers are code that runs and returns what it should."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROWS = {
    "first.jsonl": 5,
    "improved.jsonl": 8,
    "improved_valid.jsonl": 4,
    "python_100.jsonl": 100,
    "python_valid.jsonl": 20,
}
HELD_OUT = {"python_valid.jsonl": "python_100.jsonl", "improved_valid.jsonl": "improved.jsonl"}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]


def question_and_code(row: dict[str, Any]) -> tuple[str, str]:
    """A row's question, and the Python of its answer."""
    if "messages" not in row:
        return row["instruction"] + row["input"], row["output"]
    user, assistant = row["messages"]
    [code] = re.findall(r"^```python\n(.*?)^```$", assistant["content"], re.M | re.S)
    return user["content"], code


@pytest.mark.parametrize(("name", "count"), ROWS.items())
def test_a_file_has_as_many_rows_as_promised_in_one_known_form(
    root: Path, name: str, count: int
) -> None:
    rows = read(root / "data" / name)
    assert len(rows) == count
    for row in rows:
        if "messages" in row:
            assert row.keys() == {"messages"}
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            assert all(message.keys() == {"role", "content"} for message in row["messages"])
        else:
            assert row.keys() == {"instruction", "input", "output"}
            assert all(isinstance(value, str) for value in row.values())
            assert row["instruction"]
            assert row["output"]


@pytest.mark.parametrize("name", ROWS)
def test_every_answer_runs_and_its_calls_give_the_right_results(root: Path, name: str) -> None:
    for row in read(root / "data" / name):
        _, code = question_and_code(row)
        [defined] = re.findall(r"^(?:def|class) (\w+)", code, re.M)
        namespace: dict[str, Any] = {}
        exec(compile(code, defined, "exec"), namespace)
        for call in CALLS[defined]:
            assert eval(call, namespace) is True, call


@pytest.mark.parametrize("name", ["first.jsonl", "python_100.jsonl", "python_valid.jsonl"])
def test_an_example_shown_in_the_input_is_true(root: Path, name: str) -> None:
    examples = [row for row in read(root / "data" / name) if row["input"]]
    assert examples
    for row in examples:
        namespace: dict[str, Any] = {}
        exec(row["output"], namespace)
        call, result = row["input"].split(" returns ")
        assert repr(eval(call, namespace)) == result


def test_no_task_appears_twice_in_all_files(root: Path) -> None:
    rows = [row for name in ROWS for row in read(root / "data" / name)]
    questions, codes = zip(*map(question_and_code, rows), strict=True)
    assert len(set(questions)) == len(rows)
    assert len(set(codes)) == len(rows)


@pytest.mark.parametrize(("valid", "train"), HELD_OUT.items())
def test_no_validation_row_is_also_a_training_row(root: Path, valid: str, train: str) -> None:
    training = read(root / "data" / train)
    assert not [row for row in read(root / "data" / valid) if row in training]


def test_the_readme_names_every_file_and_its_rows(root: Path) -> None:
    readme = (root / "data" / "README.md").read_text("utf-8")
    assert {file.name for file in (root / "data").glob("*.jsonl")} == ROWS.keys()
    for name, count in ROWS.items():
        assert f"`{name}` | {count} |" in readme


# What each function must return: expressions that are true once the answer has run.
CALLS = {
    "is_rotation": ['is_rotation("abcde", "cdeab") == True', 'is_rotation("abc", "acb") == False'],
    "run_length": ["run_length(\"aaabcc\") == 'a3b1c2'"],
    "prime_factors": ["prime_factors(84) == [2, 2, 3, 7]", "prime_factors(13) == [13]"],
    "most_common": ["most_common(\"the cat saw the dog\", 1) == ['the']"],
    "matmul": ["matmul([[1, 2], [3, 4]], [[0, 1], [1, 0]]) == [[2, 1], [4, 3]]"],
    "double": ["double(4) == 8", "double(-3) == -6"],
    "square": ["square(5) == 25", "square(-4) == 16"],
    "distance": ["distance(3, 10) == 7", "distance(10, 3) == 7"],
    "is_even": ["is_even(6) == True", "is_even(7) == False"],
    "is_positive": ["is_positive(2.5) == True", "is_positive(0) == False"],
    "larger": ["larger(4, 9) == 9", "larger(5, -5) == 5"],
    "sign": ["sign(-12) == -1", "sign(0) == 0", "sign(7) == 1"],
    "clamp": ["clamp(15, 0, 10) == 10", "clamp(-2, 0, 10) == 0", "clamp(5, 0, 10) == 5"],
    "mean": ["mean([2, 4, 9]) == 5.0"],
    "median": ["median([1, 3, 8]) == 3"],
    "factorial": ["factorial(5) == 120", "factorial(0) == 1"],
    "fibonacci": ["fibonacci(10) == 55", "fibonacci(0) == 0"],
    "is_prime": ["is_prime(13) == True", "is_prime(9) == False", "is_prime(1) == False"],
    "gcd": ["gcd(12, 18) == 6", "gcd(7, 5) == 1"],
    "divisors": ["divisors(12) == [1, 2, 3, 4, 6, 12]"],
    "digit_sum": ["digit_sum(1234) == 10"],
    "reverse_digits": ["reverse_digits(123) == 321", "reverse_digits(40) == 4"],
    "is_leap_year": [
        "is_leap_year(2024) == True",
        "is_leap_year(1900) == False",
        "is_leap_year(2000) == True",
    ],
    "to_fahrenheit": ["to_fahrenheit(100) == 212.0"],
    "to_metres": ["to_metres(2.5) == 2500.0"],
    "rectangle_area": ["rectangle_area(3, 4) == 12"],
    "hypotenuse": ["hypotenuse(3, 4) == 5.0"],
    "percentage": ["percentage(25, 200) == 12.5"],
    "sum_to": ["sum_to(10) == 55"],
    "sum_of_squares": ["sum_of_squares([1, 2, 3]) == 14"],
    "power": ["power(2, 10) == 1024", "power(7, 0) == 1"],
    "to_binary": ["to_binary(10) == '1010'"],
    "from_binary": ['from_binary("1010") == 10'],
    "to_hex": ["to_hex(255) == 'ff'"],
    "count_ones": ["count_ones(7) == 3", "count_ones(8) == 1"],
    "reverse_text": ["reverse_text(\"abc\") == 'cba'"],
    "is_palindrome": ['is_palindrome("level") == True', 'is_palindrome("hello") == False'],
    "count_vowels": ['count_vowels("Education") == 5'],
    "remove_vowels": ["remove_vowels(\"banana\") == 'bnn'"],
    "count_words": ['count_words("a short line of text") == 5', 'count_words("") == 0'],
    "longest_word": ["longest_word(\"the quick panda\") == 'quick'"],
    "first_word": ["first_word(\"hello big world\") == 'hello'"],
    "capitalize_words": ["capitalize_words(\"good morning\") == 'Good Morning'"],
    "initials": ["initials(\"ada lovelace\") == 'AL'"],
    "remove_spaces": ["remove_spaces(\"a b c\") == 'abc'"],
    "repeat_text": ['repeat_text("ha", 3, "-") == \'ha-ha-ha\''],
    "starts_with_vowel": [
        'starts_with_vowel("apple") == True',
        'starts_with_vowel("pear") == False',
    ],
    "are_anagrams": [
        'are_anagrams("listen", "silent") == True',
        'are_anagrams("abc", "abd") == False',
    ],
    "count_characters": ["count_characters(\"hello\") == {'h': 1, 'e': 1, 'l': 2, 'o': 1}"],
    "word_counts": ["word_counts(\"to be or not to be\") == {'to': 2, 'be': 2, 'or': 1, 'not': 1}"],
    "keep_digits": ["keep_digits(\"tel. 12-34\") == '1234'"],
    "shorten": ["shorten(\"abcdef\", 3) == 'abc...'", "shorten(\"abc\", 3) == 'abc'"],
    "center_text": ["center_text(\"hi\", 6) == '**hi**'"],
    "to_camel_case": ["to_camel_case(\"read_file_name\") == 'readFileName'"],
    "slugify": ["slugify(\"My First Post\") == 'my-first-post'"],
    "caesar": ["caesar(\"xyz\", 3) == 'abc'"],
    "swap_ends": ["swap_ends(\"abcd\") == 'dbca'", "swap_ends(\"a\") == 'a'"],
    "squeeze": ["squeeze(\"aabbbca\") == 'abca'"],
    "positions": ['positions("banana", "a") == [1, 3, 5]'],
    "pieces": ["pieces(\"abcdefg\", 3) == ['abc', 'def', 'g']"],
    "join_numbers": ["join_numbers([1, 2, 3]) == '1, 2, 3'"],
    "parse_numbers": ['parse_numbers("4,5,6") == [4, 5, 6]'],
    "sum_even": ["sum_even([1, 2, 3, 4]) == 6"],
    "product": ["product([2, 3, 4]) == 24", "product([]) == 1"],
    "largest": ["largest([3, 9, 2]) == 9"],
    "second_largest": ["second_largest([4, 9, 9, 7]) == 7"],
    "spread": ["spread([4, 1, 8]) == 7"],
    "reverse_list": ["reverse_list([1, 2, 3]) == [3, 2, 1]"],
    "unique": ["unique([3, 1, 3, 2, 1]) == [3, 1, 2]"],
    "flatten": ["flatten([[1, 2], [3], []]) == [1, 2, 3]"],
    "chunk": ["chunk([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]"],
    "rotate_left": ["rotate_left([1, 2, 3, 4], 1) == [2, 3, 4, 1]"],
    "running_totals": ["running_totals([1, 2, 3]) == [1, 3, 6]"],
    "differences": ["differences([1, 4, 9]) == [3, 5]"],
    "every_second": ["every_second([1, 2, 3, 4, 5]) == [1, 3, 5]"],
    "keep_positive": ["keep_positive([-1, 2, 0, 3]) == [2, 3]"],
    "count_value": ["count_value([1, 2, 1, 1], 1) == 3"],
    "find_index": ["find_index([5, 6, 7], 7) == 2", "find_index([5, 6, 7], 1) == -1"],
    "binary_search": ["binary_search([1, 3, 5, 7], 5) == 2", "binary_search([1, 3, 5, 7], 4) == 2"],
    "is_sorted": ["is_sorted([1, 2, 2, 5]) == True", "is_sorted([3, 1]) == False"],
    "has_duplicates": ["has_duplicates([1, 2, 1]) == True", "has_duplicates([1, 2, 3]) == False"],
    "common_items": ["common_items([1, 2, 3], [3, 4, 1]) == [1, 3]"],
    "interleave": ["interleave([1, 2], [3, 4]) == [1, 3, 2, 4]"],
    "dot_product": ["dot_product([1, 2, 3], [4, 5, 6]) == 32"],
    "scale_values": ["scale_values([1, 2], 3) == [3, 6]"],
    "transpose": ["transpose([[1, 2], [3, 4]]) == [[1, 3], [2, 4]]"],
    "diagonal": ["diagonal([[1, 2], [3, 4]]) == [1, 4]"],
    "row_sums": ["row_sums([[1, 2], [3, 4]]) == [3, 7]"],
    "identity": ["identity(2) == [[1, 0], [0, 1]]"],
    "insertion_sort": ["insertion_sort([3, 1, 2, 1]) == [1, 1, 2, 3]"],
    "merge_sorted": ["merge_sorted([1, 4], [2, 3]) == [1, 2, 3, 4]"],
    "sort_by_length": [
        "sort_by_length([\"pear\", \"fig\", \"apple\"]) == ['fig', 'pear', 'apple']"
    ],
    "group_by_letter": [
        "group_by_letter([\"ant\", \"bee\", \"ape\"]) == {'a': ['ant', 'ape'], 'b': ['bee']}"
    ],
    "word_lengths": ["word_lengths([\"hi\", \"hello\"]) == {'hi': 2, 'hello': 5}"],
    "invert": ["invert({\"a\": 1, \"b\": 2}) == {1: 'a', 2: 'b'}"],
    "add_counts": ['add_counts({"x": 1}, {"x": 2, "y": 3}) == {\'x\': 3, \'y\': 3}'],
    "best_key": ['best_key({"a": 3, "b": 7}) == \'b\''],
    "above": ['above({"a": 3, "b": 7}, 5) == {\'b\': 7}'],
    "total_value": ['total_value({"a": 3, "b": 7}) == 10'],
    "sorted_keys": ["sorted_keys({\"b\": 1, \"a\": 2}) == ['a', 'b']"],
    "all_pairs": ["all_pairs([1, 2], [3]) == [(1, 3), (2, 3)]"],
    "fizz_buzz": ["fizz_buzz(15) == 'FizzBuzz'", "fizz_buzz(9) == 'Fizz'", "fizz_buzz(7) == '7'"],
    "is_balanced": ['is_balanced("(a(b))") == True', 'is_balanced(")(") == False'],
    "format_time": ["format_time(125) == '2:05'"],
    "format_price": ["format_price(3.5) == '$3.50'"],
    "triple": ["triple(4) == 12"],
    "is_odd": ["is_odd(7) == True", "is_odd(6) == False"],
    "smaller": ["smaller(4, 9) == 4"],
    "cube": ["cube(3) == 27"],
    "lcm": ["lcm(4, 6) == 12"],
    "to_celsius": ["to_celsius(212) == 100.0"],
    "rectangle_perimeter": ["rectangle_perimeter(3, 4) == 14"],
    "digit_count": ["digit_count(1234) == 4"],
    "last_word": ["last_word(\"hello big world\") == 'world'"],
    "count_upper": ['count_upper("Hello World") == 2'],
    "keep_letters": ["keep_letters(\"a1b2\") == 'ab'"],
    "ends_with_digit": ['ends_with_digit("room 7") == True', 'ends_with_digit("seven") == False'],
    "sum_odd": ["sum_odd([1, 2, 3, 4]) == 4"],
    "smallest": ["smallest([3, 9, 2]) == 2"],
    "rotate_right": ["rotate_right([1, 2, 3, 4], 1) == [4, 1, 2, 3]"],
    "keep_negative": ["keep_negative([-1, 2, 0, -3]) == [-1, -3]"],
    "column_sums": ["column_sums([[1, 2], [3, 4]]) == [4, 6]"],
    "group_by_length": [
        "group_by_length([\"ant\", \"bear\", \"ape\"]) == {3: ['ant', 'ape'], 4: ['bear']}"
    ],
    "worst_key": ['worst_key({"a": 3, "b": 7}) == \'a\''],
    "format_percent": ["format_percent(0.125) == '12.5%'"],
    "even_numbers": ["even_numbers([1, 2, 3, 4]) == [2, 4]", "even_numbers([-2, 5]) == [-2]"],
    "word_frequencies": [
        "word_frequencies('To be or not to be') == {'to': 2, 'be': 2, 'or': 1, 'not': 1}",
        "word_frequencies('a')['b'] == 0",
    ],
    "safe_divide": [
        "safe_divide(6, 3) == 2.0",
        "safe_divide(1, 0) == 0.0",
        "safe_divide(1, 0, -1) == -1",
    ],
    "stairs": ["stairs(4) == 5", "stairs(30) == 1346269"],
    "Account": ["[a := Account(), a.deposit(50), a.withdraw(20), a.balance][-1] == 30"],
    "by_age": [
        "by_age([('Bo', 30), ('Al', 30), ('Cy', 20)]) == [('Cy', 20), ('Al', 30), ('Bo', 30)]"
    ],
    "batches": [
        "list(batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]",
        "list(batches([], 3)) == []",
    ],
    "is_strong": [
        "is_strong('Abcdefg1') == True",
        "is_strong('abcdefg1') == False",
        "is_strong('Ab1') == False",
    ],
    "longest": ["longest(['a', 'ccc', 'bb']) == 'ccc'", "longest([]) == ''"],
    "split_parity": ["split_parity([1, 2, 3, 4]) == ([2, 4], [1, 3])"],
    "merged": ["merged({'a': 1, 'b': 2}, {'b': 3}) == {'a': 1, 'b': 3}"],
    "CallCounter": ["[counter := CallCounter(), counter(), counter()][-1] == 2"],
}
