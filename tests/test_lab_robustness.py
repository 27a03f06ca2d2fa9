"""The requested fraction of patches is hidden, random for each image, and the same for every model."""

import pytest
import torch

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


def test_accuracy_falls_to_that_of_a_grey_image(model: DropKeyViTForImageClassification) -> None:
    images = torch.randn(12, 3, 8, 8)
    labels = predict_logits(model, images).argmax(-1)
    assert metrics_of(predict_logits(model, images), labels)["accuracy"] == 1
    found = occlusion_accuracy(model, images, labels, patch=2)
    assert list(found) == list(OCCLUDED_FRACTIONS)
    for fraction, accuracy in found.items():
        hidden = predict_logits(model, occlude(images, fraction, patch=2)).argmax(-1)
        assert accuracy == pytest.approx((hidden == labels).float().mean().item())
