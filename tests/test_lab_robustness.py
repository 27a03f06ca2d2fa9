"""The requested fraction of patches is hidden, random for each image, and the same for every model."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.lab.robustness import OCCLUDED_FRACTIONS, metrics_of, occlude, occlusion_accuracy, predict_logits


@pytest.fixture
def model() -> DropKeyViTForImageClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return DropKeyViTForImageClassification(
        DropKeyViTConfig(**shape, image_size=8, patch_size=2, num_labels=3, dropkey_ratio=0.5)
    )


@pytest.mark.parametrize(("fraction", "hidden"), [(0, 0), (0.25, 3), (0.5, 6), (0.75, 9), (1, 12)])
def test_whole_patches_are_hidden(fraction: float, hidden: int) -> None:
    images = torch.rand(5, 3, 6, 8) + 1
    found = occlude(images, fraction, patch=2)
    patches = found.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    gone = (patches == 0).all(-1)
    assert (gone == (patches == 0).any(-1)).all(), "a patch is hidden whole or not at all"
    assert gone.sum(1).tolist() == [hidden] * 5
    assert torch.equal(found[found != 0], images[found != 0])


def test_each_image_hides_other_patches_and_the_seed_repeats_them() -> None:
    images = torch.ones(64, 1, 8, 8)
    found = occlude(images, 0.5, patch=2)
    assert torch.equal(found, occlude(images, 0.5, patch=2)) and not torch.equal(
        found, occlude(images, 0.5, patch=2, seed=1)
    )
    assert len({tuple(image.flatten().tolist()) for image in found}) > 60
    # every patch is hidden about as often
    assert ((found == 0).float().mean(0) - 0.5).abs().max() < 0.3


def test_bad_values_are_errors() -> None:
    images = torch.ones(1, 1, 8, 6)
    with pytest.raises(ValueError, match=r"fraction=1.5 of the patches is outside \[0, 1\]"):
        occlude(images, 1.5, patch=2)
    for patch in (0, 4):
        with pytest.raises(ValueError, match=f"patches of {patch} pixels do not fill images of 8 x 6"):
            occlude(images, 0.5, patch=patch)


def test_logits_are_those_of_eval_mode_in_any_batch(model: DropKeyViTForImageClassification) -> None:
    images = torch.randn(7, 3, 8, 8)
    model.train()
    frozen = next(module for module in model.modules() if module is not model)
    frozen.eval()
    found = predict_logits(model, images, batch_size=3)
    assert model.training and not frozen.training
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(images).logits)


class BrightestPatch(nn.Module):
    """Classes are the patches of an image, logits their means: right while the one bright patch is visible, else 0."""

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        means = nn.functional.avg_pool2d(pixel_values, 2).mean(1).flatten(1)
        return SimpleNamespace(logits=means - 0.01 * torch.arange(16))


def test_accuracy_falls_to_that_of_a_grey_image() -> None:
    """By the fraction that is hidden, since this model sees nothing else; a grey image has class 0, which no label is."""
    labels = torch.arange(1500) % 15 + 1
    bright = nn.functional.one_hot(labels, 16).float().view(-1, 1, 4, 4)
    images = bright.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
    model = BrightestPatch()
    found = occlusion_accuracy(model, images, labels, patch=2)
    assert list(found) == list(OCCLUDED_FRACTIONS) == [0.25, 0.5, 0.75]
    for fraction, accuracy in found.items():
        # 4.5 standard deviations
        assert abs(accuracy - (1 - fraction)) < 4.5 * math.sqrt(fraction * (1 - fraction) / len(images))
    assert metrics_of(predict_logits(model, images), labels)["accuracy"] == 1
    assert metrics_of(predict_logits(model, occlude(images, 1, patch=2)), labels)["accuracy"] == 0
    assert metrics_of(predict_logits(model, occlude(images, 1, patch=2)), 0 * labels)["accuracy"] == 1


def test_the_seed_and_the_patch_reach_the_images() -> None:
    """Accuracy is that of the occluded images, with this seed and this side of a patch."""
    labels = torch.arange(300) % 16
    bright = nn.functional.one_hot(labels, 16).float().view(-1, 1, 4, 4)
    images = bright.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
    results = []
    for patch, seed in [(2, 0), (2, 1), (4, 0)]:
        found = occlusion_accuracy(BrightestPatch(), images, labels, patch=patch, seed=seed)
        for fraction, accuracy in found.items():
            hidden = predict_logits(BrightestPatch(), occlude(images, fraction, patch=patch, seed=seed)).argmax(-1)
            assert accuracy == pytest.approx((hidden == labels).float().mean().item())
        results.append(tuple(found.values()))
    assert len(set(results)) == 3
