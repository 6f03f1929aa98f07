"""Scores of readings, by hand."""

import pytest

from mnist.cli import InputError
from mnist.reading.truth import ReadDigit, Score, align, read_truth


def digits(text, confidence=0.9, accepted=True):
    return [ReadDigit(int(character), confidence, accepted) for character in text]


def test_alignment_has_the_fewest_differences():
    assert align("123", "123") == [(0, 0), (1, 1), (2, 2)]
    assert align("123", "13") == [(0, 0), (1, None), (2, 1)]
    assert align("13", "123") == [(0, 0), (None, 1), (1, 2)]
    assert align("", "7") == [(None, 0)] and align("", "") == []


@pytest.mark.parametrize(
    ("truth", "read", "right", "failures"),
    [
        ("12345", "12345", 5, {}),
        ("12345", "12945", 4, {"misread": 1}),
        ("12345", "1245", 4, {"not found": 1}),
        ("12345", "123745", 5, {"invented": 1}),
        ("1842", "163342", 3, {"cut wrongly": 3}),  # the 8 became 6, 3 and 3
        ("", "7", 0, {"invented": 1}),
    ],
)
def test_ways_of_failing(truth, read, right, failures):
    score = Score()
    score.add(truth, [[digits(read)]])
    assert score.digits_right == right
    assert dict(score.failures) == failures


def test_lines_with_and_without_grouping():
    score = Score()
    score.add("12 34/56/78", [[digits("1234")], [digits("5"), digits("6")], [digits("78")]])
    assert (score.lines, score.lines_right, score.lines_grouped_right) == (3, 3, 1)


def test_an_invented_digit_that_was_accepted_is_an_error():
    score = Score()
    score.add("12", [[digits("12", 0.99), digits("7", 0.95)]])
    score.add("34", [[digits("3", 0.99), digits("9", 0.3, accepted=False)]])
    report = score.report()
    assert report["accepted"]["right"] == 3 and report["accepted"]["of"] == 4
    assert report["accepted_of_truth"] == 1.0  # four accepted, four in the truth
    assert report["digits"]["share"] == 0.75
    surest = report["curve"][0]
    assert surest["coverage"] == 0.25 and surest["accuracy"] == 1.0
    assert report["curve"][-1]["accuracy"] == 0.6


def test_truth_file(tmp_path):
    (tmp_path / "truth.csv").write_text("file,truth,note\na.jpg,12 3/4,x\nsub/b.png,,\n")
    found = read_truth(tmp_path / "truth.csv")
    assert found == {
        str(tmp_path / "a.jpg"): "12 3/4",
        str(tmp_path / "sub/b.png"): "",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,truth\na,1\n", "expected the columns file and truth"),
        ("file,truth\na.jpg,1.5\n", "line 2: expected digits, spaces and slashes, found '1.5'"),
        (None, "No such file"),
    ],
)
def test_bad_truth(tmp_path, content, message):
    path = tmp_path / "truth.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_truth(path)
