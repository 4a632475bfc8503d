import pytest


@pytest.mark.parametrize("target", ["tflite", "tfjs", "tensorrt"])
def test_the_card_says_what_a_user_needs(make, target):
    emotion = (make("emotion", target, "one") / "README.md").read_text()
    assert "# Grimace: emotion, " + target in emotion
    assert "float32 (16, 16, 1), grey" in emotion and "seven probabilities: a, b" in emotion
    assert "Training data: MIT." in emotion and "`" + "ab" * 32 + "`" in emotion
    assert "accuracy 0.7500" in emotion
    points = (make("landmarks", target, "two") / "README.md").read_text()
    assert "15 points of the scheme kaggle-15" in points and "widened by 0.2" in points
    assert "{" not in points.replace("{session", "").split("## How good")[1]


def test_it_tells_of_layers_left_in_float(make):
    card = (make() / "README.md").read_text()
    assert "| int8 | `int8.tflite` | int8 | 1 of 3 layers left in float |" in card
