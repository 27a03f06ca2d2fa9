"""Times T2T-ViT and VOLO against their official structure in plain PyTorch, with and without DropKey.

    python scripts/benchmark_models.py --out model_cards/benchmarks.csv
    python scripts/benchmark_models.py --models volo_d1 --batch_size 1 --rounds 1

The plain models below are written from the published architectures alone, with an explicit softmax in every attention
as the official ones have. Before the timing they get our weights and must give our logits. Timed are inference
and training steps: forward, the losses of all heads, backward and AdamW. Variants alternate in every round, and are
compared by their ratios within rounds. Where timm can be imported, its VOLO is included; it trains on its summed
logits.
"""

import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser

from hf_dropkey.classification.families import FAMILIES
from hf_dropkey.lab.timing import append_rows, interleaved_times, origin, ratios, spread


# variants are "backend/regulariser"
PLAIN, OFF, ON, TIMM = "plain/none", "sdpa/none", "sdpa/dropkey", "timm/none"
# the largest difference that two implementations may show in float32, relative to the largest logit
LOGIT_TOLERANCE = 1e-4
CLASSES = 1000


@dataclass
class BenchmarkArguments:
    """The models, the variants, the output."""

    models: list[str] = field(
        default_factory=lambda: ["t2t_vit_14", "volo_d1"],
        metadata={"help": "Published sizes of T2T-ViT with performer stages, and of VOLO."},
    )
    batch_size: int = field(default=8, metadata={"help": "Images in a batch."})
    image_size: int = field(default=224, metadata={"help": "Pixels, a multiple of 16."})
    ratio: float = field(default=0.1, metadata={"help": "Drop ratio, the same in all layers."})
    rounds: int = field(default=15, metadata={"help": "Interleaved rounds, after one to warm up."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: torch's."})
    device: str = field(default="cpu", metadata={"help": "Such as cpu or cuda."})
    out: Path | None = field(default=None, metadata={"help": "CSV file to append to."})

    def __post_init__(self) -> None:
        """Raises ValueError for numbers below 1 and for models without a plain counterpart."""
        if min(self.rounds, self.batch_size) < 1:
            raise ValueError(f"--rounds {self.rounds} and --batch_size {self.batch_size} must be at least 1")
        unknown = [name for name in self.models if name not in MODELS]
        if unknown:
            raise ValueError(f"--models {' '.join(unknown)} is unknown; choose from {', '.join(MODELS)}")


# --- the official structure ------------------------------------------------------------------------------------------
# parameters are defined in the order of ours, which is how they get our weights


class PlainAttention(nn.Module):
    """Self-attention with one matrix for queries, keys and values, without a bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class PlainClassAttention(nn.Module):
    """Attention of the first token to all."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` to `[B, 1, C]`."""
        batch, tokens, width = x.shape
        q = self.q(x[:, :1]).reshape(batch, 1, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).reshape(batch, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, 1, width))


class PlainOutlook(nn.Module):
    """Outlook attention: scores of 9 x 9 window positions from the window's centre."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.v = nn.Linear(width, width, bias=False)
        self.scores = nn.Linear(width, heads * 81)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, height, width, C]` to the same."""
        batch, height, width, channels = x.shape
        v = F.unfold(self.v(x).permute(0, 3, 1, 2), 3, padding=1, stride=2)
        v = v.reshape(batch, self.heads, channels // self.heads, 9, -1).permute(0, 1, 4, 3, 2)
        centres = F.avg_pool2d(x.permute(0, 3, 1, 2), 2, 2, ceil_mode=True).permute(0, 2, 3, 1)
        scores = self.scores(centres).reshape(batch, -1, self.heads, 9, 9).transpose(1, 2)
        mixed = (scores * self.scale).softmax(-1) @ v
        mixed = mixed.permute(0, 1, 4, 3, 2).reshape(batch, channels * 9, -1)
        return self.proj(F.fold(mixed, (height, width), 3, padding=1, stride=2).permute(0, 2, 3, 1))


class PlainPerformer(nn.Module):
    """Linear attention by random features, with the values as its skip connection."""

    def __init__(self, width_in: int, width: int, dropout: float):
        super().__init__()
        self.w = nn.Parameter(torch.empty(width // 2, width), requires_grad=False)
        self.kqv = nn.Linear(width_in, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` to `[B, N, C / 2]`."""
        return torch.exp(x @ self.w.T - x.square().sum(-1, keepdim=True) / 2) / len(self.w) ** 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, width_in]` to `[B, N, width]`."""
        k, q, v = self.kqv(x).chunk(3, dim=-1)
        k, q = self.features(k), self.features(q)
        total = torch.einsum("bnm,bm->bn", q, k.sum(1))[..., None]
        mixed = torch.einsum("bnm,bcm->bnc", q, torch.einsum("bnc,bnm->bcm", v, k))
        return v + self.dropout(self.proj(mixed / (total + 1e-8)))


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Two linear maps with a GELU between them."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class PlainBlock(nn.Module):
    """A layer that normalises what goes into its attention and its MLP."""

    def __init__(self, width: int, attention: nn.Module, ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = mlp(width, int(width * ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, ..., C]` to the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainClassBlock(PlainBlock):
    """The same for the first token alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` to the same."""
        first = x[:, :1] + self.attn(self.norm1(x))
        return torch.cat((first + self.mlp(self.norm2(first)), x[:, 1:]), dim=1)


class PlainTokenStage(nn.Module):
    """A token stage of T2T-ViT with a performer."""

    def __init__(self, width_in: int, width: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width_in, eps=1e-5)
        self.attn = PlainPerformer(width_in, width, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = mlp(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, width_in]` to `[B, N, width]`."""
        x = self.attn(self.norm1(x))
        return x + self.dropout(self.mlp(self.norm2(x)))


class PlainT2TViT(nn.Module):
    """T2T-ViT (Yuan et al., ICCV 2021) with performer token stages."""

    positions: torch.Tensor

    def __init__(self, config: Any):
        super().__init__()
        width, token = config.hidden_size, config.token_size
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", torch.zeros(1, (config.image_size // 16) ** 2 + 1, width))
        self.stages = nn.ModuleList(PlainTokenStage(n, token, config.performer_dropout_prob) for n in (147, 9 * token))
        self.project = nn.Linear(9 * token, width)
        self.blocks = nn.Sequential(
            *(
                PlainBlock(width, PlainAttention(width, config.num_attention_heads), config.mlp_ratio)
                for _ in range(config.num_hidden_layers)
            )
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, config.num_labels)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`[B, 3, side, side]` to class scores."""
        x = F.unfold(x, 7, stride=4, padding=2).transpose(1, 2)
        for stage in self.stages:
            x = stage(x).transpose(1, 2)
            side = int(x.shape[-1] ** 0.5)
            x = F.unfold(x.reshape(*x.shape[:2], side, side), 3, stride=2, padding=1).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), self.project(x)), dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0]), None


class PlainVolo(nn.Module):
    """VOLO (Yuan et al., 2021) with its dense head; patches stay on a grid until the class layers."""

    def __init__(self, config: Any):
        super().__init__()
        width, fine, side, ratio = (
            config.hidden_size,
            config.outlook_hidden_size,
            config.image_size // 16,
            config.mlp_ratio,
        )
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, side, side, width))
        stem: list[nn.Module] = []
        for channels, kernel, stride in ((3, 7, 2), (config.stem_size, 3, 1), (config.stem_size, 3, 1)):
            stem.append(nn.Conv2d(channels, config.stem_size, kernel, stride, kernel // 2, bias=False))
            stem += [nn.BatchNorm2d(config.stem_size), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*stem)
        self.project = nn.Conv2d(config.stem_size, fine, 4, 4)
        outlook = (
            PlainBlock(fine, PlainOutlook(fine, config.num_outlook_heads), ratio) for _ in range(config.depths[0])
        )
        self.outlook = nn.Sequential(*outlook)
        self.pool = nn.Conv2d(fine, width, 2, 2)
        heads = config.num_attention_heads
        layers = (PlainBlock(width, PlainAttention(width, heads), ratio) for _ in range(sum(config.depths[1:])))
        self.blocks = nn.Sequential(*layers)
        last = (
            PlainClassBlock(width, PlainClassAttention(width, heads), ratio) for _ in range(config.num_class_layers)
        )
        self.class_blocks = nn.Sequential(*last)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, config.num_labels)
        self.dense_head = nn.Linear(width, config.num_labels)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, 3, side, side]` to class scores, and in training those of all patches."""
        x = self.outlook(self.project(self.stem(x)).permute(0, 2, 3, 1))
        x = self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + self.positions
        x = self.blocks(x.flatten(1, 2))
        x = self.norm(self.class_blocks(torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1)))
        scores, dense = self.head(x[:, 0]), self.dense_head(x[:, 1:])
        return (scores, dense) if self.training else (scores + 0.5 * dense.amax(1), None)


PLAIN_MODELS: dict[str, Any] = {"t2t_vit": PlainT2TViT, "volo": PlainVolo}
# size -> family, of the published sizes that have a plain counterpart
MODELS = {
    size: family
    for family in PLAIN_MODELS
    for size, fields in FAMILIES[family].config_class.published_sizes.items()
    if fields.get("token_stage") != "transformer"
}


# --- variants --------------------------------------------------------------------------------------------------------


def with_weights_of(source: nn.Module, model: nn.Module) -> nn.Module:
    """`model` with the weights of `source`, in the order of definition.

    Raises:
        ValueError: Their shapes differ.
    """
    weights, wanted = source.state_dict(), model.state_dict()
    if [value.shape for value in weights.values()] != [value.shape for value in wanted.values()]:
        raise ValueError(f"{type(model).__name__} and {type(source).__name__} have weights of different shapes")
    model.load_state_dict(dict(zip(wanted, weights.values(), strict=True)))
    return model


def variants(size: str, arguments: BenchmarkArguments, images: torch.Tensor) -> dict[str, nn.Module]:
    """The models to compare, all but timm's with the same weights; the first one is the plain model.

    Raises:
        ValueError: The plain model gives other logits than ours.
    """
    family = FAMILIES[MODELS[size]]
    settings = {"image_size": arguments.image_size, "num_labels": CLASSES, "dropkey_schedule": "constant"}
    config = family.config_class.from_size(size, dropkey_ratio=0.0, **settings)
    ours = family.model_class(config).eval()
    plain = with_weights_of(ours, PLAIN_MODELS[MODELS[size]](config)).eval()
    dropping = family.model_class(family.config_class.from_size(size, dropkey_ratio=arguments.ratio, **settings))
    models = {PLAIN: plain, OFF: ours, ON: with_weights_of(ours, dropping)}
    if MODELS[size] == "volo":
        try:
            import timm  # type: ignore[import-not-found]  # optional, ships no types
        except (ImportError, RuntimeError) as error:
            # torchvision, which timm imports, fails with a RuntimeError beside another build of torch
            print(f"{size}: not compared with timm, which cannot be imported ({error})")
        else:
            models[TIMM] = timm.create_model(f"{size}_224", img_size=arguments.image_size, num_classes=CLASSES)
    models = {name: model.to(images.device) for name, model in models.items()}
    with torch.no_grad():
        expected, found = models[OFF](images).logits, models[PLAIN](images)[0]
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= LOGIT_TOLERANCE:
        raise ValueError(
            f"the logits of the plain {size} differ by {difference:.2g} of the largest one, more than "
            f"{LOGIT_TOLERANCE:g}: it computes another function, so times cannot be compared"
        )
    print(f"{size}: logits of the plain model agree with ours to {difference:.1g} of the largest one", flush=True)
    return models


def inference(model: nn.Module, images: torch.Tensor) -> None:
    """The forward pass in eval mode."""
    with torch.inference_mode():
        model.eval()(images)


def losses_of(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """The loss of the class scores, and of those of all patches at half the weight where the model gives them."""
    if isinstance(output, torch.Tensor):
        return F.cross_entropy(output, labels)
    scores, dense = output if isinstance(output, tuple) else (output.logits, output.get("token_logits"))
    loss = F.cross_entropy(scores, labels)
    if dense is None:
        return loss
    return loss + 0.5 * F.cross_entropy(dense.flatten(0, 1), labels.repeat_interleave(dense.shape[1]))


def training_step(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """A job that runs forward, backward and AdamW."""
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=1e-6)
    labels = torch.arange(len(images), device=images.device) % CLASSES

    def step() -> None:
        losses_of(model.train()(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- rows ------------------------------------------------------------------------------------------------------------


def measure(size: str, arguments: BenchmarkArguments) -> Iterator[dict[str, Any]]:
    """The rows of one model: times, and their ratios to the plain model and to ours without DropKey."""
    side = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, side, side, device=arguments.device)
    models = variants(size, arguments, images)
    # in inference DropKey is off anyway
    forwards = {name: partial(inference, model, images) for name, model in models.items() if name != ON}
    steps = {name: training_step(model, images) for name, model in models.items()}
    config: Any = models[OFF].config
    about = {
        "dtype": "float32",
        "batch": arguments.batch_size,
        "heads": config.num_attention_heads,
        "tokens": (side // 16) ** 2 + 1,
        "head_width": config.hidden_size // config.num_attention_heads,
    }
    source = origin(images.device, f"python scripts/benchmark_models.py {shlex.join(sys.argv[1:])}".strip())
    for work, jobs in (("forward", forwards), ("step", steps)):
        times = interleaved_times(jobs, arguments.rounds, device=images.device)
        print(f"\n{size} {work}, batch {arguments.batch_size}, {side} px")
        for name, values in times.items():
            found = {"time": spread(values)}
            for base in (PLAIN, OFF):
                found[f"time over {base}"] = spread(ratios(values, times[base]))
            line = "".join(f"   {found[f'time over {base}'].median:.3f} x {base}" for base in (PLAIN, OFF))
            print(f"{name:<14}{found['time'].median:>10.1f} ms{line}", flush=True)
            backend, regulariser = name.split("/")
            for metric, value in found.items():
                numbers = {"value": value.median, "first_quartile": value.first, "third_quartile": value.third}
                yield {
                    **source,
                    "workload": f"{size} {work}",
                    **about,
                    "backend": backend,
                    "regulariser": regulariser,
                    "drop_ratio": arguments.ratio if name == ON else 0.0,
                    "metric": metric,
                    **{key: f"{number:.5g}" for key, number in numbers.items()},
                    "unit": "ms" if metric == "time" else "ratio",
                    "n": value.n,
                }


def main() -> None:
    """Runs the job."""
    group: Any = BenchmarkArguments
    (arguments,) = HfArgumentParser(group).parse_args_into_dataclasses(look_for_args_file=False)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    for size in arguments.models:
        rows = list(measure(size, arguments))
        if arguments.out is not None:
            append_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
