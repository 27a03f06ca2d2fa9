"""A saved folder carries everything: each Auto class loads it in a fresh process that does not have this package.

Fresh processes run with an empty modules cache and without the repository on their path.
"""

import json
import pickle
import shutil
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification, DropKeyViTForMaskedImageModeling
from hf_dropkey.models import compatibility


REPOSITORY = Path(__file__).parents[1]
CODE = {
    "attention.py",
    "attention_mask.py",
    "backend_proofs.py",
    "compatibility.py",
    "configuration_dropkey.py",
    "configuration_dropkey_backbone.py",
    "configuration_dropkey_sizes.py",
    "configuration_dropkey_values.py",
    "configuration_dropkey_vit.py",
    "counter_hash.py",
    "cpu_attention.py",
    "efficient_attention.py",
    "dropkey.py",
    "flex_attention.py",
    "modeling_dropkey.py",
    "modeling_dropkey_backbone.py",
    "modeling_dropkey_vit.py",
    "operators.py",
    "patterns.py",
    "sample_masks.py",
    "triton_attention.py",
    "triton_kernels.py",
    "triton_launches.py",
    "triton_mask.py",
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": 5,
}
PREAMBLE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling
folder = sys.argv[1]
images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
"""
fresh = partial(fresh_process.fresh, preamble=PREAMBLE)


def model_of(cls: type, **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return cls(DropKeyViTConfig(**TINY, dropkey_ratio=0.3, **kwargs)).eval()


def images() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "my-model.v1"
    model_of(DropKeyViTForImageClassification).save_pretrained(path)
    return path


@pytest.mark.parametrize("saved", [DropKeyViTForImageClassification, DropKeyViTForMaskedImageModeling])
def test_every_auto_class_loads_whichever_head_is_saved(saved: type, tmp_path: Path) -> None:
    """From a folder that has been moved, in a process without the package, with the logits of the saved model."""
    model = model_of(saved)
    model.save_pretrained(tmp_path / "made")
    shutil.move(tmp_path / "made", tmp_path / "moved-2.0")
    assert {path.name for path in (tmp_path / "moved-2.0").glob("*.py")} == CODE
    printed = fresh(
        """
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert config.dropkey_ratio == 0.3 and type(config).__module__.startswith("transformers_modules")
        for auto in (AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling):
            model = auto.from_pretrained(folder, trust_remote_code=True)
            print(type(model).__name__, *model(images)[0].flatten()[:4].tolist())
        """,
        tmp_path / "moved-2.0",
        cache=tmp_path / "cache",
    )
    lines = dict(line.split(" ", 1) for line in printed.splitlines())
    assert set(lines) == {"DropKeyViTModel", "DropKeyViTForImageClassification", "DropKeyViTForMaskedImageModeling"}
    numbers = [float(number) for number in lines[saved.__name__].split()]
    torch.testing.assert_close(torch.tensor(numbers), model(images())[0].flatten()[:4], rtol=0, atol=1e-6)


def test_a_remote_model_trains_saves_and_loads_again(folder: Path, tmp_path: Path) -> None:
    fresh(
        """
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        def loss(seed):
            torch.manual_seed(seed)
            return model.train()(images, labels=torch.tensor([0, 1])).loss
        assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
        loss(1).backward()
        model.save_pretrained(sys.argv[2] + "/model")
        AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(sys.argv[2] + "/config")
        again = AutoModelForImageClassification.from_pretrained(sys.argv[2] + "/model", trust_remote_code=True)
        assert torch.equal(model.eval()(images).logits, again(images).logits)
        """,
        folder,
        tmp_path,
        cache=tmp_path / "cache",
    )
    for name in ("model", "config"):
        assert {path.name for path in (tmp_path / name).glob("*.py")} == CODE
        auto_map = json.loads((tmp_path / name / "config.json").read_text())["auto_map"]
        assert auto_map == DropKeyViTConfig.family_auto_map
    third = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(third(images()).logits, model_of(DropKeyViTForImageClassification)(images()).logits)


@pytest.mark.parametrize("package_first", [True, False])
def test_package_and_remote_copy_share_a_process(folder: Path, tmp_path: Path, package_first: bool) -> None:
    """The installed class wins once it is registered; a remote model made before goes on working and saving."""
    load = "remote = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)"
    fresh(
        f"""
        {"import hf_dropkey" if package_first else load}
        {load if package_first else "import hf_dropkey"}
        installed = AutoModelForImageClassification.from_pretrained(folder)
        assert type(installed) is hf_dropkey.DropKeyViTForImageClassification
        assert isinstance(remote, hf_dropkey.DropKeyViTForImageClassification) is {package_first}
        assert torch.equal(remote(images).logits, installed(images).logits)
        losses = []
        for model in (remote, installed):
            torch.manual_seed(1)
            losses.append(model.train()(images, labels=torch.tensor([0, 1])).loss)
            model.save_pretrained(sys.argv[2])
            again = AutoModelForImageClassification.from_pretrained(sys.argv[2])
            assert torch.equal(model.eval()(images).logits, again(images).logits)
        assert torch.equal(*losses)
        """,
        folder,
        tmp_path / "saved",
        cache=tmp_path / "cache",
        package=True,
    )


def test_remote_objects_reach_a_process_that_knows_nothing(folder: Path, tmp_path: Path) -> None:
    """Pickles of a remote model and configuration open where nothing was imported."""
    code = """
    import pickle
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with open(sys.argv[2], "wb") as file:
        pickle.dump([config, model, model(images).logits], file)
    """
    fresh(code, folder, tmp_path / "objects.pkl", cache=tmp_path / "cache")
    fresh(
        """
        import pickle
        with open(sys.argv[2], "rb") as file:
            config, model, logits = pickle.load(file)
        assert type(model).__module__.startswith("transformers_modules") and config.dropkey_ratio == 0.3
        assert torch.equal(model(images).logits, logits)
        """,
        folder,
        tmp_path / "objects.pkl",
        cache=tmp_path / "cache",
    )


@pytest.mark.slow
def test_spawned_workers_get_remote_models(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"
    script.write_text(
        PREAMBLE
        + textwrap.dedent(
            """
            def work(model, queue):
                queue.put((type(model).__name__, model(images).logits.tolist()))

            if __name__ == "__main__":
                model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
                context = torch.multiprocessing.get_context("spawn")
                queue = context.Queue()
                process = context.Process(target=work, args=(model, queue))
                process.start()
                name, logits = queue.get(timeout=120)
                process.join(60)
                assert logits == model(images).logits.tolist(), name
            """
        )
    )
    # a spawned child imports the main module again, so that must be a file
    start = f"import subprocess\nsubprocess.run([sys.executable, {str(script)!r}, folder], check=True)"
    fresh(start, folder, cache=tmp_path / "cache")


def test_installed_objects_pickle_as_usual() -> None:
    model = pickle.loads(pickle.dumps(model_of(DropKeyViTForImageClassification)))
    assert type(model) is DropKeyViTForImageClassification
    assert torch.equal(model(images()).logits, model_of(DropKeyViTForImageClassification)(images()).logits)


def test_a_users_registered_subclass_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "my_head.py").write_text(
        "from hf_dropkey import DropKeyViTForImageClassification\n\n\n"
        "class MyHead(DropKeyViTForImageClassification):\n    pass\n\n\n"
        "MyHead.register_for_auto_class('AutoModelForImageClassification')\n"
    )
    fresh(
        """
        sys.path.insert(0, sys.argv[1])
        from my_head import MyHead
        from hf_dropkey import DropKeyViTConfig
        MyHead(DropKeyViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                                image_size=8, patch_size=4)).save_pretrained(sys.argv[1] + "/saved")
        """,
        tmp_path,
        cache=tmp_path / "cache",
        package=True,
    )
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageClassification"] == "my_head.MyHead"
    assert auto_map["AutoModel"] == "modeling_dropkey_vit.DropKeyViTModel"
    assert CODE | {"my_head.py"} == {path.name for path in (tmp_path / "saved").glob("*.py")}


@pytest.mark.parametrize("version", ["4.57.6", "5.12.1", "6.0.0"])
def test_other_releases_of_transformers_get_one_clear_sentence(version: str) -> None:
    with pytest.raises(ImportError, match=rf"transformers>=5.13,<6, but {version} is installed: run `pip install"):
        compatibility.check_transformers(version)
    for fine in ("5.13.0", "5.23.0", "5.99.0.dev0"):
        compatibility.check_transformers(fine)


def test_the_sentence_is_what_a_user_of_an_old_release_sees(folder: Path, tmp_path: Path) -> None:
    printed = fresh(
        """
        import transformers
        transformers.__version__ = "5.2.0"
        try:
            AutoConfig.from_pretrained(folder, trust_remote_code=True)
        except ImportError as error:
            print(error)
        """,
        folder,
        cache=tmp_path / "cache",
    )
    assert printed.startswith("DropKey models need transformers>=5.13,<6, but 5.2.0 is installed")
