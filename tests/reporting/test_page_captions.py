"""What the page says of a caption: its attributes, its errors, its scores."""

import pytest

from captioning.reporting.page_captions import caption_row


@pytest.mark.parametrize(
    "prediction, reference, modality, kinds",
    [
        ("CT, left lung", "CT, right lung", "CT", ["wrong_laterality"]),
        ("CT, left lung", "CT of a lung", "CT", ["none"]),  # the reference need not name the side
        ("CT of a lung", "CT, left lung", "CT", ["missed_laterality"]),
        ("MRI", "an image", "CT", ["wrong_modality"]),  # the modality of the image is known by its concepts
        ("MRI", "an image", "unknown", ["none"]),
        ("no effusion", "an effusion", "unknown", ["wrong_negation"]),
        ("MRI, no focal lesion", "Normal MRI", "unknown", ["none"]),
        ("no fracture", "two fractures, no effusion", "unknown", ["wrong_negation"]),
        ("an effusion", "no effusion", "unknown", ["missed_negation"]),
        ("a mass of 36 mm", "a mass of 3.5 cm", "unknown", ["none"]),
        ("a mass of 50 mm", "a mass of 3.5 cm", "unknown", ["wrong_measurement"]),
        (" ", "CT", "CT", ["empty", "missed_modality"]),
    ],
)
def test_errors_of_a_caption(prediction, reference, modality, kinds):
    assert caption_row("id", reference, [prediction], modality, [], [])["kinds"] == kinds


def test_tags_say_where_a_value_stands_and_numbers_are_finite():
    row = caption_row(
        "id", "left lung, no effusion, 3.5 cm", ["right lung, 36 mm"], "CT", ["C0040405"], [0.5, float("nan")]
    )
    tags = {("chest", 0), ("left", 1), ("right", 2), ("no effusion", 1), ("36 mm", 0)}
    assert set(row["tags"][0]) == tags
    assert (row["concepts"], row["scores"]) == ([("C0040405 CT", 3)], [0.5, None])
