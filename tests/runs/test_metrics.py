"""Rows to metrics.jsonl, lines to the screen."""

from mnist.runs.metrics import NoTracker, Tracker, read_metrics


def row(step, images, loss, accuracy, speed, **more):
    return {
        "step": step,
        "epoch": images / 100,
        "images": images,
        "train/loss": loss,
        "train/accuracy": accuracy,
        "images_per_second": speed,
        **more,
    }


ROWS = [
    row(3, 75, 4.0, 0.2, 25.0),
    row(4, 100, 2.0, 0.6, 5.0, **{"validation/loss": 1.25, "validation/accuracy": 0.5}),
    row(8, 200, 1.0, 1.0, 100.0),
]


def test_rows_come_back_and_epochs_are_means_over_their_images(tmp_path, capsys):
    with Tracker(tmp_path / "metrics.jsonl", steps=8, epochs=2) as tracker:
        for each in ROWS:
            tracker.log(each)
            assert read_metrics(tmp_path / "metrics.jsonl")[-1] == each  # at once, not at the end
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS
    # By hand: (75·4 + 25·2) / 100 = 3.5; (75·0.2 + 25·0.6) / 100 = 0.3; 100 images in 3 + 5 s.
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2  train 3.5000 30.00%  validation 1.2500 50.00%  12 images/s",
        "epoch 2/2  train 1.0000 100.00%  100 images/s",
    ]


def test_no_tracker_writes_and_says_nothing(capsys):
    with NoTracker() as tracker:
        tracker.log(ROWS[0])
    assert capsys.readouterr() == ("", "")
