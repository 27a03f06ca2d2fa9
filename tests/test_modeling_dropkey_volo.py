"""DropKeyVolo beside the official model: the same numbers with and without drops, and Transformers' features."""

from typing import Any

import pytest
import torch
from architecture_suite import ArchitectureSuite, pytest_parameters
from torch import nn

from hf_dropkey.models.configuration_dropkey_volo import DropKeyVoloConfig
from hf_dropkey.models.dropkey import PATTERNS
from hf_dropkey.models.modeling_dropkey_volo import (
    DropKeyVoloForImageClassification,
    DropKeyVoloModel,
    DropKeyVoloOutlookAttention,
    draw_swapped_tokens,
    swap_with_mirror,
)


OUTLOOK = {"network.0.0.attn": "volo.outlook_layers.0.attention"}
LAYERS = {f"network.{index + 2}.0.attn": f"volo.stages.{index}.0.attention" for index in range(3)}
CLASS = {f"post_network.{index}.attn": f"volo.class_layers.{index}.attention" for index in range(2)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pytest_parameters(metafunc)


class TestVolo(ArchitectureSuite):
    """The suite, and what only VOLO has."""

    family = "volo"
    config_class = DropKeyVoloConfig
    model_class = DropKeyVoloModel
    classifier_class = DropKeyVoloForImageClassification
    patterns = PATTERNS
    tiny = {
        "depths": [1, 1, 1],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "outlook_hidden_size": 16,
        "num_outlook_heads": 2,
        "num_class_layers": 1,
        "stem_size": 8,
        "mlp_ratio": 2,
        "image_size": 48,
        "num_labels": 5,
    }
    fixtures = {
        "volo_tiny": {
            "config": {
                "depths": [1, 1, 1, 1],
                "hidden_size": 64,
                "num_attention_heads": 4,
                "outlook_hidden_size": 32,
                "num_outlook_heads": 2,
                "stem_size": 16,
                "mlp_ratio": 2,
            },
            "stages": {
                "patch_embed": "volo.embeddings",
                "network.0.0.attn": "volo.outlook_layers.0.attention",
                "network.0": "volo.outlook_layers.0",
                "network.1": "volo.downsample",
                "network.2": "volo.stages.0.0",
                "network.3": "volo.stages.1.0",
                "network.4": "volo.stages.2.0",
                "post_network.0.attn": "volo.class_layers.0.attention",
                "post_network.0": "volo.class_layers.0",
                "post_network.1": "volo.class_layers.1",
                "norm": "volo.layernorm",
                "head": "classifier",
                "aux_head": "token_classifier",
            },
            "sites": {**OUTLOOK, **LAYERS, **CLASS},
            "drops": {"logits_all": lambda site: True, "logits_no_outlook": lambda site: site not in OUTLOOK},
        }
    }
    sizes = {
        "volo_d1": (26_632_040, 26_632_040, 260),
        "volo_d2": (58_678_336, 58_678_336, 330),
        "volo_d3": (86_325_072, 86_325_072, 466),
        "volo_d4": (192_961_520, 192_961_520, 466),
        "volo_d5": (295_455_584, 295_455_584, 606),
    }
    hidden_shapes = [(3, 36, 16), (3, 36, 16), (3, 9, 32), (3, 9, 32), (3, 10, 32)]
    attention_shapes = [(27, 2, 9, 9), (3, 4, 9, 9), (3, 4, 9, 9), (3, 4, 1, 10)]
    enabled_sites = [
        (
            {},
            [
                "volo.outlook_layers.0.attention",
                "volo.stages.0.0.attention",
                "volo.stages.1.0.attention",
                "volo.class_layers.0.attention",
            ],
        ),
        (
            {"dropkey_outlook": False, "dropkey_class_attention": False},
            ["volo.stages.0.0.attention", "volo.stages.1.0.attention"],
        ),
    ]

    def as_ours(self, stage: str, expected: torch.Tensor) -> torch.Tensor:
        # the official down-sampling gives channels last
        return expected.permute(0, 3, 1, 2) if stage == "network.1" else expected

    def as_mask(self, site: str, mask: torch.Tensor) -> torch.Tensor:
        # (image, head, window, query, key): every window is a batch entry of its own
        return mask.transpose(1, 2).flatten(0, 1) if mask.ndim == 5 else mask

    # --- outlook attention

    @pytest.mark.parametrize("grid", [(6, 6), (5, 8), (7, 3)])
    def test_outlook_attention_is_its_definition(self, grid: tuple[int, int], backend: str) -> None:
        """Every output is a sum over the windows that cover it, from the scores of their centres, by plain loops."""
        torch.manual_seed(0)
        config = DropKeyVoloConfig(**self.tiny, attn_implementation=backend)
        attention = DropKeyVoloOutlookAttention(config, 0.3).double().eval()
        rows, columns = grid
        tokens = torch.randn(2, rows * columns, 16, dtype=torch.float64)
        image = tokens.unflatten(1, grid)
        values = attention.v_proj(image).unflatten(-1, (2, 8))
        mixed = torch.zeros(2, rows, columns, 2, 8, dtype=torch.float64)
        for row in range(0, rows, 2):
            for column in range(0, columns, 2):
                centre = image[:, row : row + 2, column : column + 2].mean((1, 2))
                weights = (attention.score_proj(centre).view(2, 2, 9, 9) * 8**-0.5).softmax(-1)
                around = [(row + y, column + x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
                for query, (y, x) in enumerate(around):
                    if not (0 <= y < rows and 0 <= x < columns):
                        continue
                    for key, (v, u) in enumerate(around):
                        if 0 <= v < rows and 0 <= u < columns:
                            mixed[:, y, x] += weights[:, :, query, key, None] * values[:, v, u]
        found, _ = attention(tokens, grid)
        torch.testing.assert_close(found, attention.o_proj(mixed.flatten(-2)).flatten(1, 2))

    def test_a_window_never_loses_all_its_keys(self) -> None:
        model = self.build(dropkey_ratio=0.9, dropkey_schedule="constant", attn_implementation="eager").train()
        weights = model(self.pixels(8), output_attentions=True).attentions[0]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        # a row that would lose all nine drops none: 0.9 ** 9 = 0.387
        untouched = (weights > 0).all(-1).double().mean().item()
        assert abs(untouched - 0.9**9 - 0.1**9) < 0.03

    # --- dense head

    def test_the_dense_head_counts_half_in_eval(self) -> None:
        model = self.build()
        output = model.volo(self.pixels())
        tokens = model.token_classifier(output.last_hidden_state[:, 1:])
        expected = model.classifier(output.pooler_output) + tokens.max(1).values / 2
        found = model(self.pixels())
        assert torch.equal(found.logits, expected)
        assert found.token_logits is None

    def test_the_dense_head_can_be_left_out(self) -> None:
        model = self.build(dense_head=False)
        assert model.token_classifier is None
        assert torch.equal(model(self.pixels()).logits, model.classifier(model.volo(self.pixels()).pooler_output))
        output = model.train()(self.pixels(), labels=self.labels())
        assert output.token_logits is None
        torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, self.labels()))

    def token_targets(self, kind: str) -> torch.Tensor | None:
        """Targets of the 3 x 3 tokens of each image."""
        torch.manual_seed(2)
        scores = torch.randn(3, 3, 3, 5).softmax(-1)
        return {"none": None, "classes": scores.argmax(-1), "scores": scores}[kind]

    @pytest.mark.parametrize("kind", ["none", "classes", "scores"])
    def test_token_labelling_loss_by_hand(self, kind: str) -> None:
        model = self.build(dropkey_ratio=0.0, dense_loss_weight=0.7).train()
        targets = self.token_targets(kind)
        output = model(self.pixels(), labels=self.labels(), token_targets=targets)
        logs = output.token_logits.log_softmax(-1)
        if kind == "scores":
            dense = -(targets.flatten(1, 2) * logs).sum(-1).mean()
        else:
            classes = self.labels()[:, None].expand(3, 9) if targets is None else targets.flatten(1)
            dense = -logs.gather(-1, classes[..., None]).mean()
        expected = nn.functional.cross_entropy(output.logits, self.labels()) + 0.7 * dense
        torch.testing.assert_close(output.loss, expected)
        count = torch.tensor(6)
        accumulated = model(self.pixels(), labels=self.labels(), token_targets=targets, num_items_in_batch=count)
        torch.testing.assert_close(accumulated.loss, expected / 2)

    @pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
    def test_the_dense_head_follows_other_problem_types(self, problem_type: str) -> None:
        model = self.build(dropkey_ratio=0.0, problem_type=problem_type).train()
        labels = torch.rand(3, 5)
        output = model(self.pixels(), labels=labels)
        every = labels[:, None].expand(3, 9, 5)
        if problem_type == "regression":
            parts = [nn.functional.mse_loss(*pair) for pair in ((output.logits, labels), (output.token_logits, every))]
        else:
            bce = nn.functional.binary_cross_entropy_with_logits
            parts = [bce(output.logits, labels), bce(output.token_logits, every)]
        torch.testing.assert_close(output.loss, parts[0] + 0.5 * parts[1])
        count = torch.tensor(30)
        accumulated = model(self.pixels(), labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(accumulated, output.loss / 2)

    def test_eval_loss_is_that_of_the_logits(self) -> None:
        output = self.build()(self.pixels(), labels=self.labels())
        torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, self.labels()))

    @pytest.mark.parametrize("shape", [(3, 9), (3, 3, 4), (3, 3, 3, 4), (2, 3, 3)])
    def test_token_targets_of_another_shape_are_refused(self, shape: tuple[int, ...]) -> None:
        if shape == (3, 9):
            shape = (3, 10)
        with pytest.raises(ValueError, match=r"rows \* columns = 9, the number of 16 x 16 pixel patches"):
            self.build().train()(self.pixels(), labels=self.labels(), token_targets=torch.zeros(shape).long())

    # --- mix-token

    def test_boxes_are_uniform_in_area_and_place(self) -> None:
        torch.manual_seed(0)
        boxes = torch.stack([draw_swapped_tokens((14, 10), torch.device("cpu")) for _ in range(3000)])
        for box in boxes[:200]:
            rows, columns = box.any(1), box.any(0)
            assert torch.equal(box, rows[:, None] & columns)
            for line in (rows, columns):
                assert (line.int().diff().abs().sum() + line[0] + line[-1]).item() in (0, 2)
        # empty where the shorter side would be less than 2 of 10 tokens, so for areas below 0.04
        assert abs((boxes.flatten(1).sum(1) == 0).double().mean() - 0.04) < 0.015
        share = boxes.double().mean((1, 2))
        assert share.max() > 0.6
        # symmetric up to the half-open interval, most often in the middle
        places = boxes.double().mean(0)
        assert places[7, 5] > places[0, 0] > 0

    def test_swapping_twice_changes_nothing(self) -> None:
        values, swapped = torch.randn(4, 2, 5, 6), torch.rand(5, 6) < 0.5
        mixed = swap_with_mirror(values, swapped)
        assert torch.equal(mixed[1][:, swapped], values[2][:, swapped])
        assert torch.equal(mixed[1][:, ~swapped], values[1][:, ~swapped])
        assert torch.equal(swap_with_mirror(mixed, swapped), values)

    def test_mix_token_by_hand(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Patches are swapped, the class loss is weighted by area, and tokens answer for their own image."""
        model = self.build(dropkey_ratio=0.0, mix_token=True).train()
        box = torch.zeros(3, 3, dtype=torch.bool)
        box[1:, :2] = True
        module = "hf_dropkey.models.modeling_dropkey_volo.draw_swapped_tokens"
        monkeypatch.setattr(module, lambda grid, device: box)
        seen: dict[str, torch.Tensor] = {}
        model.volo.outlook_layers[0].register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
        targets = self.token_targets("classes")
        output = model(self.pixels(), labels=self.labels(), token_targets=targets)

        model.volo.embeddings.train()
        patches = model.volo.embeddings(self.pixels())
        fine = box.repeat_interleave(2, 0).repeat_interleave(2, 1)
        expected = torch.where(fine, patches.flip(0), patches).flatten(2).transpose(1, 2)
        torch.testing.assert_close(seen["tokens"], expected)

        logs, token_logs = output.logits.log_softmax(-1), output.token_logits.log_softmax(-1)
        loss, share = torch.zeros(()), 4 / 9
        for image in range(3):
            loss = loss - ((1 - share) * logs[image, image] + share * logs[image, 2 - image]) / 3
            for token, other in enumerate(box.flatten()):
                source = 2 - image if other else image
                answer = targets.flatten(1)[source, token]
                loss = loss - 0.5 * token_logs[image, token, answer] / 27
        torch.testing.assert_close(output.loss, loss)

    def test_mix_token_draws_in_training_only(self) -> None:
        model = self.build(dropkey_ratio=0.0, mix_token=True)
        assert torch.equal(model(self.pixels()).logits, self.build(dropkey_ratio=0.0)(self.pixels()).logits)
        model.train()
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(model(self.pixels(), labels=self.labels()).loss)
        assert torch.equal(losses[0], losses[1])
        assert not torch.equal(losses[0], losses[2])

    def test_mix_token_without_labels_is_refused(self) -> None:
        with pytest.raises(ValueError, match="mix_token = False"):
            self.build(mix_token=True).train()(self.pixels())

    @pytest.mark.slow
    def test_mix_token_compiles_without_graph_breaks(self) -> None:
        torch._dynamo.reset()
        model = self.build(mix_token=True, problem_type="single_label_classification").train()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        losses = []
        for one in (model, compiled):
            torch.manual_seed(3)
            losses.append(one(self.pixels(), labels=self.labels()).loss)
        torch.testing.assert_close(*losses)

    # --- the rest

    def test_stochastic_depth_skips_outlook_and_class_layers(self) -> None:
        model = self.build(drop_path_rate=0.4, depths=[2, 2, 1])
        found = [layer.drop_path.ratio for layer in model.volo.outlook_layers]
        found += [layer.drop_path.ratio for stage in model.volo.stages for layer in stage]
        found += [layer.drop_path.ratio for layer in model.volo.class_layers]
        assert found == pytest.approx([0, 0, 0.2, 0.3, 0.4, 0])

    @pytest.mark.parametrize("image_size", [224, 384, 448, 512])
    def test_published_resolutions(self, image_size: int) -> None:
        with torch.device("meta"):
            model = DropKeyVoloForImageClassification(DropKeyVoloConfig.from_size("volo_d1", image_size=image_size))
            side = image_size // 16
            assert model.volo.embeddings.position_embeddings.shape == (1, side, side, 384)
            assert model(torch.empty(1, 3, image_size, image_size)).logits.shape == (1, 2)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"depths": [4]}, r"at least 1, got \[4\]"),
            ({"depths": [4, 0]}, r"at least 1, got \[4, 0\]"),
            ({"outlook_hidden_size": 15}, "`outlook_hidden_size` .15. must be a positive multiple"),
            ({"num_class_layers": 0}, "at least 1, got 0"),
            ({"mix_token": True, "dense_head": False}, "needs dense_head=True"),
            ({"dense_loss_weight": -1}, "at least 0, got -1"),
            ({"dropkey_pattern": "block", "dropkey_window": 4, "image_size": 96}, "3 x 3 patch grid, got 4"),
        ],
    )
    def test_volo_settings_that_make_no_sense_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(Exception, match=message) as caught:
            self.config_class(**{**self.tiny, **settings})
        assert "StrictDataclass" in type(caught.value).__name__
