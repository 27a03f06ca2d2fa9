"""Time and memory of DropKey on every backend, of no dropout, of attention dropout and of the paper's listing.

Attention alone, forward and backward, in a few shapes; ratios are to plain fused attention in the same run:
    python scripts/benchmark_attention.py --shapes 16x6x197x64 2x6x1025x64 --out model_cards/benchmarks.csv
Whole training steps of ViT-S/16 and ViT-B/16:
    python scripts/benchmark_attention.py --workload step --models small base --out model_cards/benchmarks.csv

On a GPU a row has the driver, the clock, the Triton release and the attention kernel that ran, so its file is another one:
    python scripts/benchmark_attention.py --shapes 128x6x197x64 --dtypes bfloat16 --out model_cards/benchmarks_gpu.csv
There is the host's time, the GPU's between events with a cold cache, that of a CUDA graph, of the forward pass alone, and
of each kernel. `scripts/check_gpu.sh` runs it after the tests.

Each variant except plain dropout is first compared with the reference, outputs and gradients: one that fails is not
reported, and the exit status is 1. --help lists everything. On a noisy machine raise --rounds; quote ratios.
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    HfArgumentParser,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.masking_utils import sdpa_mask

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification, disable_fast_masks, enable_fast_masks
from hf_dropkey.lab.gpu_timing import (
    attention_kernel,
    captured,
    event_timer,
    gpu_facts,
    kernel_times,
    short_name,
    warm_clock,
)
from hf_dropkey.lab.timing import Spread, append_rows, interleaved_times, origin, peak_memory, ratios, spread
from hf_dropkey.models.attention import TRITON_NAME, default_device, dropkey_attention_forward
from hf_dropkey.models.attention_mask import Settings
from hf_dropkey.models.counter_hash import draw_seed
from hf_dropkey.models.dropkey import dropped_scores
from hf_dropkey.models.efficient_attention import aligned_mask
from hf_dropkey.reference import reference_attention


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# a variant may be this much further from the float64 reference than explicit attention in the same dtype
ALLOWED_ERROR = 4.0
# the reference is a loop over rows
CHECKED_HEADS, CHECKED_TOKENS = 2, 1025
PAPER = "paper_listing"
FAST = "fast masks"
GPU_BACKENDS = ("flex_attention", TRITON_NAME)
FUSED, DEFAULT = f"{TRITON_NAME}/dropkey", "sdpa/dropkey"
# the shapes of Touvron et al., DeiT, ICML 2021, table 1
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}


@dataclass
class BenchmarkArguments:
    """The workloads, the variants, the output."""

    workload: str = field(default="attention", metadata={"help": "'attention' alone, or whole training 'step's."})
    shapes: list[str] = field(
        default_factory=lambda: ["16x6x197x64", "2x6x1025x64"],
        metadata={"help": "Attention alone: batch x heads x tokens x head width, for example 16x6x197x64."},
    )
    models: list[str] = field(default_factory=lambda: ["small"], metadata={"help": "Steps: tiny, small, base."})
    batch_size: int = field(default=8, metadata={"help": "Steps: images in a batch."})
    image_size: int = field(default=224, metadata={"help": "Steps: pixels, a multiple of 16."})
    dtypes: list[str] = field(
        default_factory=lambda: ["float32"],
        metadata={"help": "float32, bfloat16, float16; steps use them as autocast."},
    )
    ratio: float = field(
        default=0.1, metadata={"help": "Drop ratio of DropKey and of dropout, the same in all layers."}
    )
    token_ratio: float = field(default=0.3, metadata={"help": "Drop ratio of the pattern 'token'."})
    variants: list[str] = field(
        default_factory=list, metadata={"help": "Only these, as 'backend/regulariser'. Default: all of the device."}
    )
    compile: bool = field(default=False, metadata={"help": "Adds compiled variants of DropKey."})
    fast_masks: bool = field(default=False, metadata={"help": "Adds variants with masks by compiled C++, on a CPU."})
    rounds: int = field(default=15, metadata={"help": "Interleaved rounds."})
    repeats: int | None = field(
        default=None, metadata={"help": "Runs between two readings of the clock. Default: 20 on a GPU, else 1."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: torch's."})
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator, if any, else the CPU."})
    memory: bool = field(default=True, metadata={"help": "Measures peak memory too."})
    out: Path | None = field(default=None, metadata={"help": "CSV file to append to."})

    def __post_init__(self) -> None:
        for flag, values, allowed in (
            ("workload", [self.workload], ("attention", "step")),
            ("models", self.models, MODELS),
            ("dtypes", self.dtypes, DTYPES),
        ):
            unknown = [name for name in values if name not in allowed]
            if unknown:
                raise ValueError(f"--{flag} {' '.join(unknown)} is unknown; choose from {', '.join(allowed)}")
        if min(self.rounds, 1 if self.repeats is None else self.repeats, self.batch_size) < 1:
            raise ValueError(
                f"--rounds {self.rounds}, --repeats {self.repeats} and --batch_size {self.batch_size} must be at least 1"
            )
        if self.image_size < 16 or self.image_size % 16:
            raise ValueError(
                f"--image_size {self.image_size} is not a positive multiple of 16; choose for example 224"
            )

    def parsed_shapes(self) -> list[tuple[int, int, int, int]]:
        """The shapes as numbers."""
        found = []
        for text in self.shapes:
            numbers = [int(part) for part in text.split("x") if part.isdigit()]
            if len(numbers) != 4 or min(numbers) < 1:
                raise ValueError(f"--shapes {text!r} is not batch x heads x tokens x head width, such as 16x6x197x64")
            found.append((numbers[0], numbers[1], numbers[2], numbers[3]))
        return found


DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


# --- attention alone --------------------------------------------------------------------------------------------------


def paper_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ratio: float) -> torch.Tensor:
    """The listing of the paper: a Bernoulli tensor times -1e12, added to the scores; the lowest number in float16."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    lowest = max(-1e12, torch.finfo(scores.dtype).min)
    scores = scores + torch.bernoulli(torch.ones_like(scores) * ratio) * lowest
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()


def eager_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    """Explicit weights as in Transformers' `eager`, softmax in float32."""
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (nn.functional.dropout(weights, dropout) @ value).transpose(1, 2).contiguous()


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    """PyTorch's own choice of fused kernel."""
    return scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).contiguous()


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    """PyTorch's FlashAttention-2."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return fused_attention(query, key, value, dropout)


def dropkey(backend: str, ratio: float, pattern: str) -> Attention:
    """DropKey on a backend, as the models call it."""
    site: Any = SimpleNamespace(
        training=True, dropkey_ratio=ratio, dropkey_pattern=pattern, dropkey_window=3, num_key_value_groups=1
    )

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scaling = query.shape[-1] ** -0.5
        return dropkey_attention_forward(site, query, key, value, None, implementation=backend, scaling=scaling)[0]

    return attend


def job_of(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call as a variant makes it: those with fast masks switch them on as long as it lasts."""
    if FAST not in name:
        return call

    def fast(*inputs: Any) -> Any:
        enable_fast_masks()
        try:
            return call(*inputs)
        finally:
            disable_fast_masks()

    return fast


class ReadyMask:
    """PyTorch's attention with a mask that is there already: the floor of attention with any mask."""

    def __init__(self, ratio: float, kernel: SDPBackend | None):
        self.ratio, self.kernel = ratio, kernel
        self.masks: dict[torch.Size, torch.Tensor] = {}

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if query.shape not in self.masks:
            settings = Settings(self.ratio, "score", 3, None)
            self.masks[query.shape] = aligned_mask(draw_seed(query.device), query, key, None, settings)
        with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            output = scaled_dot_product_attention(query, key, value, attn_mask=self.masks[query.shape])
        return output.transpose(1, 2).contiguous()


def attention_variants(
    arguments: BenchmarkArguments, device: torch.device, dtype: torch.dtype
) -> dict[str, Attention]:
    """The variants that the device can run, as "backend/regulariser"; the first one is the baseline of the ratios."""
    ratio = arguments.ratio
    # FlashAttention takes half precision only
    flash = device.type == "cuda" and dtype.itemsize == 2
    found: dict[str, Attention] = {}
    if flash:
        found["flash/none"] = partial(flash_attention, dropout=0.0)
        found["flash/attention dropout"] = partial(flash_attention, dropout=ratio)
    found["sdpa/none"] = partial(fused_attention, dropout=0.0)
    found["sdpa/attention dropout"] = partial(fused_attention, dropout=ratio)
    found["eager/none"] = partial(eager_attention, dropout=0.0)
    found["eager/attention dropout"] = partial(eager_attention, dropout=ratio)
    found["eager/paper listing"] = partial(paper_attention, ratio=ratio)
    if device.type == "cuda":
        found["memory-efficient/ready mask"] = ReadyMask(ratio, SDPBackend.EFFICIENT_ATTENTION)
    else:
        found["sdpa/ready mask"] = ReadyMask(ratio, None)
    backends = ["eager", "sdpa"] + (list(GPU_BACKENDS) if device.type == "cuda" else [])
    for backend in backends:
        found[f"{backend}/dropkey"] = dropkey(backend, ratio, "score")
        if arguments.compile and backend in ("eager", "sdpa"):
            found[f"{backend} compiled/dropkey"] = torch.compile(dropkey(backend, ratio, "score"))
    if arguments.fast_masks:
        found[f"sdpa {FAST}/dropkey"] = dropkey("sdpa", ratio, "score")
    found["sdpa/dropkey key"] = dropkey("sdpa", ratio, "key")
    found["sdpa/dropkey token"] = dropkey("sdpa", arguments.token_ratio, "token")
    return selected(found, arguments.variants)


def selected(found: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    """The first variant, the baseline, and the wanted ones.

    Raises:
        ValueError: A wanted variant does not exist.
    """
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ValueError(
            f"--variants {' '.join(map(repr, unknown))} is unknown on this device; choose from {', '.join(found)}"
        )
    first = next(iter(found))
    return {name: found[name] for name in found if not wanted or name in wanted or name == first}


def make_inputs(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """query, key and value as views of `[B, N, H, D]`, as models make them, and the gradient of the output."""
    batch, heads, tokens, width = shape
    drawn = torch.randn(4, batch, tokens, heads, width, device=device, dtype=dtype)
    return [part.transpose(1, 2).requires_grad_() for part in drawn[:3].unbind()], drawn[3]


def forward_backward(attend: Attention, inputs: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    output = attend(inputs[0], inputs[1], inputs[2])
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def forward_alone(attend: Attention, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The output, without anything for a backward pass."""
    with torch.no_grad():
        return attend(inputs[0], inputs[1], inputs[2])


def expected_drop(
    regulariser: str, arguments: BenchmarkArguments, shape: tuple[int, int, int, int], inputs: list[torch.Tensor]
) -> torch.Tensor | None:
    """The mask that a variant will use, drawn as the variant draws it."""
    size = (*shape[:3], shape[2])
    if regulariser == "none":
        return None
    if regulariser == "paper listing":
        return torch.bernoulli(torch.ones(size, dtype=inputs[0].dtype, device=inputs[0].device) * arguments.ratio) > 0
    pattern = regulariser.removeprefix("dropkey").strip() or "score"
    pattern = "score" if regulariser == "ready mask" else pattern
    ratio = arguments.token_ratio if pattern == "token" else arguments.ratio
    return dropped_scores(draw_seed(inputs[0].device).cpu(), size, ratio, pattern=pattern)


def error_over_eager(
    name: str, attend: Attention, arguments: BenchmarkArguments, shape: tuple[int, int, int, int], like: torch.Tensor
) -> float:
    """The largest relative error of output and gradients against the float64 reference, over that of `eager`."""
    small = (1, min(shape[1], CHECKED_HEADS), min(shape[2], CHECKED_TOKENS), shape[3])
    inputs, upstream = make_inputs(small, like.device, like.dtype)
    torch.manual_seed(7)
    dropped = expected_drop(name.split("/")[1], arguments, small, inputs)
    torch.manual_seed(7)
    found = job_of(name, forward_backward)(attend, inputs, upstream)
    mask = torch.zeros((), device=like.device) if dropped is None else dropped.to(like.device)

    def masked_eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(mask.bool(), float("-inf"))
        return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2)

    eager = forward_backward(masked_eager, inputs, upstream)
    exact = [part.detach().double().cpu().requires_grad_() for part in inputs]
    reference = forward_backward(
        lambda query, key, value: reference_attention(
            query, key, value, None if dropped is None else dropped.cpu()
        ).transpose(1, 2),
        exact,
        upstream.double().cpu(),
    )
    errors = [
        [
            ((one.double().cpu() - other).norm() / other.norm()).item()
            for one, other in zip(side, reference, strict=True)
        ]
        for side in (found, eager)
    ]
    return max(one / max(other, 1e-12) for one, other in zip(*errors, strict=True))


def measure_attention(arguments: BenchmarkArguments, device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows of all shapes and dtypes."""
    for shape in arguments.parsed_shapes():
        for dtype_name in arguments.dtypes:
            inputs, upstream = make_inputs(shape, device, DTYPES[dtype_name])
            checked: dict[str, Any] = {}
            for name, attend in attention_variants(arguments, device, inputs[0].dtype).items():
                if name.endswith("attention dropout"):
                    checked[name] = attend
                    continue
                error = error_over_eager(name, attend, arguments, shape, inputs[0])
                if error <= ALLOWED_ERROR:
                    checked[name] = attend
                else:
                    print(f"{name}: error {error:.1f} times eager's, over {ALLOWED_ERROR}: NOT REPORTED", flush=True)
                    FAILED.append(name)
            jobs = {
                name: job_of(name, partial(forward_backward, attend, inputs, upstream))
                for name, attend in checked.items()
            }
            sizes = dict(zip(("batch", "heads", "tokens", "head_width"), shape, strict=True))
            about = {"workload": "attention", "dtype": dtype_name, **sizes}
            forwards = {name: job_of(name, partial(forward_alone, attend, inputs)) for name, attend in checked.items()}
            yield from measured(jobs, arguments, device, about, forwards)


# --- training steps ---------------------------------------------------------------------------------------------------


def paper_listing_interface(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """The paper's listing as an attention function for the stock model; `paper_ratio` is on the module's config."""
    return paper_attention(query, key, value, module.config.paper_ratio), None


AttentionInterface.register(PAPER, paper_listing_interface)
AttentionMaskInterface.register(PAPER, sdpa_mask)


def compiled(model: nn.Module) -> nn.Module:
    """The model with its forward compiled."""
    model.compile()
    return model


def step_models(arguments: BenchmarkArguments, device: torch.device, size: str) -> dict[str, nn.Module]:
    """The models to train, by variant; the first one is the baseline of the ratios."""
    shape: dict[str, Any] = {**MODELS[size], "image_size": arguments.image_size, "num_labels": 1000}

    def stock(backend: str, **more: Any) -> nn.Module:
        config = ViTConfig(**shape, **more)
        config.paper_ratio = arguments.ratio
        return ViTForImageClassification._from_config(config, attn_implementation=backend)

    def ours(backend: str, ratio: float, pattern: str = "score") -> nn.Module:
        config = DropKeyViTConfig(**shape, dropkey_ratio=ratio, dropkey_schedule="constant", dropkey_pattern=pattern)
        return DropKeyViTForImageClassification._from_config(config, attn_implementation=backend)

    dropout = {"attention_probs_dropout_prob": arguments.ratio}
    makers: dict[str, Callable[[], nn.Module]] = {
        "sdpa/none": lambda: stock("sdpa"),
        "eager/none": lambda: stock("eager"),
        "sdpa/attention dropout": lambda: stock("sdpa", **dropout),
        "eager/attention dropout": lambda: stock("eager", **dropout),
        "eager/paper listing": lambda: stock(PAPER),
        "eager/dropkey": lambda: ours("eager", arguments.ratio),
        "sdpa/dropkey": lambda: ours("sdpa", arguments.ratio),
        "sdpa/dropkey token": lambda: ours("sdpa", arguments.token_ratio, "token"),
    }
    if arguments.fast_masks:
        makers[f"sdpa {FAST}/dropkey"] = makers["sdpa/dropkey"]
    if device.type == "cuda":
        makers |= {f"{name}/dropkey": partial(ours, name, arguments.ratio) for name in GPU_BACKENDS}
    if arguments.compile:
        makers["sdpa compiled/none"] = lambda: compiled(stock("sdpa"))
        makers["sdpa compiled/dropkey"] = lambda: compiled(ours("sdpa", arguments.ratio))
    return {name: make().to(device).train() for name, make in selected(makers, arguments.variants).items()}


def training_step(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    """A job that runs forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        low = dtype.itemsize == 2
        with torch.autocast(images.device.type, dtype) if low else nullcontext():
            loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_steps(arguments: BenchmarkArguments, device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows of all models and dtypes."""
    side = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, side, side, device=device)
    labels = torch.randint(1000, (arguments.batch_size,), device=device)
    for size in arguments.models:
        for dtype_name in arguments.dtypes:
            jobs = {
                name: job_of(name, training_step(model, images, labels, DTYPES[dtype_name]))
                for name, model in step_models(arguments, device, size).items()
            }
            heads, width = MODELS[size]["num_attention_heads"], MODELS[size]["hidden_size"]
            about = {
                "workload": f"vit_{size} step",
                "dtype": dtype_name if dtype_name == "float32" else f"{dtype_name} autocast",
                "batch": arguments.batch_size,
                "heads": heads,
                "tokens": (side // 16) ** 2 + 1,
                "head_width": width // heads,
            }
            yield from measured(jobs, arguments, device, about)


# --- rows -------------------------------------------------------------------------------------------------------------

FAILED: list[str] = []


Jobs = Mapping[str, Callable[[], Any]]
# of each job of a workload: milliseconds in each round
Times = dict[str, list[float]]


def all_times(jobs: Jobs, forwards: Jobs, arguments: BenchmarkArguments, device: torch.device) -> dict[str, Times]:
    """The times of the jobs by metric: on a GPU the host's, the GPU's, and those of the forward pass and of graphs."""
    on_gpu = device.type == "cuda"
    repeats = arguments.repeats or (20 if on_gpu else 1)
    take = partial(interleaved_times, rounds=arguments.rounds, device=device, repeats=repeats)
    if on_gpu:
        warm_clock(device)
    found = {"time": take(jobs)}
    if on_gpu:
        timer = event_timer(device)
        found["GPU time"] = take(jobs, timer=timer)
        if forwards:
            found["forward GPU time"] = take(forwards, timer=timer)
            # attention alone: an optimizer's step is not made for graphs
            graphs = {name: captured(job, device) for name, job in jobs.items()}
            found["graph time"] = take({name: job for name, job in graphs.items() if job is not None}, timer=timer)
    return found


def readings(times: dict[str, Times], name: str, first: str) -> Iterator[tuple[str, Spread, str]]:
    """Metric, value and unit of each time of a job, and of its ratio to the first job's."""
    for metric, of_jobs in times.items():
        if name in of_jobs:
            yield metric, spread(of_jobs[name]), "ms"
        # the fused kernel against the default path decides about `default_backend`
        for other in (first, DEFAULT) if name == FUSED and first != DEFAULT else (first,):
            if name in of_jobs and other in of_jobs:
                yield f"{metric} over {other}", spread(ratios(of_jobs[name], of_jobs[other])), "ratio"


def measured(
    jobs: Jobs,
    arguments: BenchmarkArguments,
    device: torch.device,
    about: dict[str, Any],
    forwards: Jobs = MappingProxyType({}),
) -> Iterator[dict[str, Any]]:
    """Times the jobs and yields their rows: times, ratios to the first job, peak memory and its ratio."""
    times = all_times(jobs, forwards, arguments, device)
    memory = {name: peak_memory(job, device) for name, job in jobs.items()} if arguments.memory else {}
    first = next(iter(jobs))
    source = origin(device, f"python scripts/benchmark_attention.py {shlex.join(sys.argv[1:])}")
    facts = gpu_facts(device) if device.type == "cuda" else {}
    print(f"\n{', '.join(f'{key} {value}' for key, value in about.items())}", flush=True)
    print(f"{'backend/regulariser':<28}{'ms':>9}{f'x {first}':>14}{'quartiles':>15}{'MiB':>9}{'x':>7}")
    # what the GPU takes counts there
    main_metric = "GPU time" if "GPU time" in times else "time"
    for name in jobs:
        backend, regulariser = name.split("/")
        found = list(readings(times, name, first))
        by_metric = {metric: value for metric, value, _ in found}
        ratio = by_metric[f"{main_metric} over {first}"]
        quartiles = f"{ratio.first:.2f}-{ratio.third:.2f}"
        line = f"{name:<28}{by_metric[main_metric].median:>9.2f}{ratio.median:>14.3f}{quartiles:>15}"
        if memory:
            found.append(("peak memory", spread([memory[name] / 2**20]), "MiB"))
            found.append((f"peak memory over {first}", spread([memory[name] / memory[first]]), "ratio"))
            line += f"{memory[name] / 2**20:>9.1f}{memory[name] / memory[first]:>7.2f}"
        more = dict(facts)
        if device.type == "cuda":
            kernels = kernel_times(jobs[name], device, 5)
            more["attention_kernel"] = attention_kernel(kernels)
            found += [(f"kernel {short_name(kernel)}", spread([ms]), "ms") for kernel, ms in kernels.items()]
            line += f"  {more['attention_kernel']}"
        print(line, flush=True)
        drop = 0.0 if regulariser == "none" else arguments.ratio
        drop = arguments.token_ratio if regulariser.endswith("token") else drop
        for metric, value, unit in found:
            numbers = {"value": value.median, "first_quartile": value.first, "third_quartile": value.third}
            yield {
                **source,
                **more,
                **about,
                "backend": backend,
                "regulariser": regulariser,
                "drop_ratio": drop,
                "metric": metric,
                **{key: f"{number:.5g}" for key, number in numbers.items()},
                "unit": unit,
                "n": value.n,
            }


def main() -> None:
    """Runs the job."""
    group: Any = BenchmarkArguments
    (arguments,) = HfArgumentParser(group).parse_args_into_dataclasses()
    # compiled code then draws the seed that eager code draws, so that the reference has the same mask
    inductor_config.fallback_random = True
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or default_device())
    measure = measure_attention if arguments.workload == "attention" else measure_steps
    for row in measure(arguments, device):
        if arguments.out is not None:
            append_rows(arguments.out, [row])
    if FAILED:
        raise SystemExit(f"not reported, because they differ from the reference: {', '.join(FAILED)}")


if __name__ == "__main__":
    main()
