"""Laws of random crops and reflections."""

import pytest
import torch
from torch.nn import functional

from mpitrain.data import augment

IMAGES = torch.arange(1, 3 * 2 * 6 * 5 + 1, dtype=torch.float32).reshape(3, 2, 6, 5)  # all pixels differ, none is zero


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("padding", "flip"), [(4, True), (2, False), (0, True), (1, True)])
def test_every_image_is_a_crop_of_the_padded_image_or_its_reflection(padding, flip):
    generator = seeded()
    seen = set()
    for _ in range(60):
        result = augment(IMAGES, generator, padding=padding, flip=flip)
        assert result.shape == IMAGES.shape
        for image, crop in zip(IMAGES, result):
            found = [
                (top, left, mirrored)
                for mirrored in ([False, True] if flip else [False])
                for top in range(2 * padding + 1)
                for left in range(2 * padding + 1)
                if torch.equal(
                    crop,
                    functional.pad(image.flip(-1) if mirrored else image, (padding,) * 4)[
                        :, top : top + 6, left : left + 5
                    ],
                )
            ]
            assert found
            seen.add(found[0])
    assert len(seen) > min(20, (2 * padding + 1) ** 2 * (1 + flip) - 1)  # they vary, within the batch too


def test_without_padding_and_flip_images_are_unchanged():
    assert torch.equal(augment(IMAGES, seeded(), padding=0, flip=False), IMAGES)


def test_the_input_and_the_global_random_state_are_unchanged():
    before, state = IMAGES.clone(), torch.get_rng_state()
    augment(IMAGES, seeded())
    assert torch.equal(IMAGES, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_saved_generator_repeats_the_augmentations():
    generator, other = seeded(), seeded(9)
    augment(IMAGES, generator)
    other.set_state(generator.get_state())
    assert all(torch.equal(augment(IMAGES, other), augment(IMAGES, generator)) for _ in range(3))
