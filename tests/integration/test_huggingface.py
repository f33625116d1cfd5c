"""Models of ``transformers``, built from configurations: wrapped, trained, woken, saved and asked to generate.

Everything goes through the library's own interfaces; nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[dev]')")

import esper  # noqa: E402
from esper.execution.hosts import describe_host, foreign_linear  # noqa: E402
from tests.core.test_dormant_identity import bits  # noqa: E402

VOCABULARY = 48


@dataclass(frozen=True)
class Case:
    """A tiny model, what it is called with, and a layer in the middle of it."""

    name: str
    build: Callable[[], Any]
    batch: Callable[[], dict[str, Tensor]]
    layer: str

    def __str__(self) -> str:
        return self.name

    def make(self) -> Any:
        torch.manual_seed(0)
        return self.build().eval()


def tokens(length: int = 6) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def classified() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 6).long(), "labels": torch.tensor([0, 2])}


def continued() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def translated() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens(4)}


def pictures() -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}


def bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=32, num_labels=3,
        )
    )  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )
    )  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
            eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16,
            patch_size=8, num_labels=3,
        )
    )  # fmt: skip


CASES = (
    Case("bert", bert, classified, "bert.encoder.layer.0.output.dense"),
    Case("gpt2", gpt2, continued, "transformer.h.0.mlp.c_proj"),
    Case("llama", llama, continued, "model.layers.0.mlp.down_proj"),
    Case("t5", t5, translated, "encoder.block.0.layer.1.DenseReluDense.wo"),
    Case("vit", vit, pictures, "vit.layers.0.mlp.fc2"),
)
GENERATING = tuple(case for case in CASES if case.name in ("gpt2", "llama", "t5"))


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))


def wake(model: esper.MorphableModel, layer: str, alpha: float = 0.5, seed_idx: int = 1) -> None:
    """Wake a low-rank seed with weights that are not zero."""
    spec = model.layer(layer).spec
    kernel = esper.compile("lowrank", d_in=spec.d_in, d_out=spec.d_out, rank=3, registry=None)
    assert asyncio.run(model.load_kernel(layer, seed_idx, kernel, alpha=alpha)), model.get_layer_stats(layer)["errors"]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.layer(layer).grafts.seed_parameters(seed_idx).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def results(model: Any, batch: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, logits and all gradients, dropout drawn from the same numbers."""
    torch.manual_seed(3)
    out = model(**batch)
    gradients = torch.autograd.grad(out.loss, list(parameters.values()), allow_unused=True)
    found = {"loss": out.loss, "logits": out.logits}
    return found | {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_dormant_model_is_its_host_bit_for_bit(case: Case, train: bool) -> None:
    host, batch = case.make().train(train), case.batch()
    model = esper.wrap(host)
    assert case.layer in model.get_layer_names()
    assert list(model.state_dict())[: len(host.state_dict())] == list(host.state_dict())
    for probed in (False, True):
        if probed:
            model.monitor.sample_now()
        expected = results(host, batch, dict(host.named_parameters()))
        got = results(model, batch, dict(model.named_parameters()))
        assert expected.keys() == got.keys()
        for name in expected:
            assert torch.equal(bits(got[name]), bits(expected[name])), name
        model.step()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_waking_saving(case: Case, tmp_path: Path) -> None:
    host, batch = case.make(), case.batch()
    model = esper.wrap(host)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    esper.optim.attach(optimizer, model)
    losses = []
    for epoch in range(12):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.step()
        losses.append(loss.item())
        if epoch == 3:
            wake(model, case.layer, alpha=0.3)
            before = {name: p.detach().clone() for name, p in model.graft_parameters().items()}
    assert losses[-1] < losses[4] and losses[3] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.graft_parameters().items())

    # Their own way to save keeps the host, under the host's keys; the seed is what is missing.
    model.save_pretrained(tmp_path / "host")
    again = type(host).from_pretrained(tmp_path / "host").eval()
    assert again.state_dict().keys() == host.state_dict().keys()
    grown = model(**batch).logits
    model.set_seed_alpha(case.layer, 1, 0.0)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    model.set_seed_alpha(case.layer, 1, 0.3)
    assert torch.equal(model(**batch).logits, grown)

    # Ours keeps both, and is loaded into what theirs builds.
    esper.save(model, tmp_path / "grown.safetensors")
    rebuilt = esper.load(tmp_path / "grown.safetensors", again)
    assert torch.equal(rebuilt(**batch).logits, grown)

    # What was given to wrap is as it was.
    assert esper.unwrap(model) is host
    untouched = case.make()
    assert torch.equal(host(**batch).logits, untouched(**batch).logits)


@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_greedy_generation_with_the_cache(case: Case) -> None:
    host = case.make()
    model = esper.wrap(host)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}
    prompt = tokens(4)
    expected = host.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    wake(model, case.layer, alpha=1.0)
    model.layer(case.layer).grafts.seed_parameters(1)["up.weight"].data.mul_(20.0)
    grown = model.generate(prompt, **options)
    assert not torch.equal(grown, expected), "the seed has a say"
    # With the cache a step computes one position, without it all of them; the tokens are the same.
    assert torch.equal(model.generate(prompt, **options, use_cache=False), grown)
    model.set_seed_alpha(case.layer, 1, 0.0)
    assert torch.equal(model.generate(prompt, **options), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_librarys_own_attributes(case: Case) -> None:
    host, batch = case.make(), case.batch()
    model: Any = esper.wrap(host)
    assert model.config.to_dict() == host.config.to_dict()
    assert model.device == host.device and model.dtype == host.dtype
    assert model.num_parameters() == host.num_parameters()
    assert model.get_input_embeddings() is model.wrapped_model.get_input_embeddings()
    assert model.main_input_name == host.main_input_name
    wake(model, case.layer)
    for options in ({"output_hidden_states": True}, {"return_dict": False}):
        plain, ours = host(**batch, **options), model(**batch, **options)
        assert type(plain) is type(ours) and len(plain) == len(ours)
    states = model(**batch, output_hidden_states=True)
    hidden = states.get("hidden_states", states.get("encoder_hidden_states"))
    assert len(hidden) == 3
    # Recording them leaves the seed on the path.
    assert torch.equal(states.logits, model(**batch).logits)


def test_settings_reach_the_host() -> None:
    model: Any = esper.wrap(CASES[1].make())
    settings = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=2)
    model.generation_config = settings
    assert model.wrapped_model.generation_config is settings
    assert model.generate(tokens(4)).shape[1] <= 7


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_checkpointing(case: Case) -> None:
    model: Any = esper.wrap(case.make())
    wake(model, case.layer)
    model.train()
    batch, parameters = case.batch(), dict(model.named_parameters())
    expected = results(model, batch, parameters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = results(model, batch, parameters)
    model.gradient_checkpointing_disable()
    assert expected.keys() == got.keys()
    for name in expected:
        # The same operations in the same order, once more.
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_conv1d_is_a_linear_host() -> None:
    (conv1d,) = foreign_linear()
    host = nn.Sequential(conv1d(6, 4), nn.Tanh()).double()  # 6 features out, 4 in
    with torch.no_grad():
        host[0].bias.normal_()
    spec = describe_host(host[0])
    assert (spec.type_name, spec.kind, spec.d_in, spec.d_out, spec.dtype) == ("Conv1D", "rows", 4, 6, torch.float64)
    model = esper.wrap(host)
    assert model.get_layer_names() == ["0"]
    wake(model, "0", alpha=0.5)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    p = model.layer("0").grafts.seed_parameters(1)
    expected = torch.tanh(host[0](x) + 0.5 * x @ p["down.weight"].t() @ p["up.weight"].t())
    # Sums of at most four float64 products, in another order.
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)
    plain = esper.export(model)
    torch.testing.assert_close(plain(x), expected, rtol=1e-13, atol=1e-13)
    assert esper.wrap(host, [conv1d]).get_layer_names() == ["0"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies_and_exports(case: Case) -> None:
    model: Any = esper.wrap(case.make())
    wake(model, case.layer)
    batch = case.batch()
    expected = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
    plain = esper.export(model)
    assert isinstance(plain, transformers.PreTrainedModel)
    # A low-rank seed is folded into its Linear: one rounding of the weight instead of a product of its own, over a few
    # layers of width 16 to 24 and values of order one.
    torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_without_a_break(case: Case) -> None:
    model, batch = esper.wrap(case.make()), case.batch()
    del batch["labels"]
    if case.name == "t5":
        batch["decoder_input_ids"] = tokens(4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Compiled attention may take its products in another order: two layers of values of order one in float32.
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    asleep = model(**batch).logits
    wake(model, case.layer)
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(**batch).logits, asleep)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_on_top_of_peft(name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    case = next(case for case in CASES if case.name == name)
    adapted = peft.get_peft_model(
        case.make(), peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    )
    model = esper.wrap(adapted)
    batch = case.batch()
    assert torch.equal(model(**batch).logits, adapted(**batch).logits)
    layer = f"base_model.model.{case.layer}.base_layer"
    wake(model, layer)
    assert not torch.equal(model(**batch).logits, adapted(**batch).logits)


class StepSeeds(transformers.TrainerCallback):
    """What a Trainer needs to drive the seeds; wakes another one on the way."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.step()
        if state.global_step == 2:
            wake(model, CASES[2].layer, seed_idx=3)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_trainer(bf16: bool, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    model: Any = esper.wrap(CASES[2].make())
    wake(model, CASES[2].layer, alpha=0.5)
    model.layer(CASES[2].layer).state_layout.set_alpha(1, 1.0, ramp_steps=4)
    seen: list[torch.dtype] = []
    model.layer(CASES[2].layer).default_transform.register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    rows = [{"input_ids": row, "labels": row} for row in tokens(6).repeat(4, 1)]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, bf16=bf16,
            use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            # A wrapped model's forward takes what its host's takes, so its signature names no column.
            remove_unused_columns=False, label_names=["labels"],
        ),
        train_dataset=rows,
        eval_dataset=rows[:2],
        callbacks=[StepSeeds()],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    grafts = {name: p.detach().clone() for name, p in model.graft_parameters().items()}
    esper.optim.attach(trainer.create_optimizer(), model)
    trainer.train()
    assert len(grafts) == 2 and len(model.graft_parameters()) == 4
    assert trainer.evaluate()["eval_loss"] < before
    assert all(not torch.equal(p, grafts[name]) for name, p in model.graft_parameters().items() if name in grafts)
    late = model.layer(CASES[2].layer).grafts.seed_parameters(3).values()
    assert {id(p) for p in late} <= {id(p) for p in trainer.optimizer.state}, "the late seed was trained too"
    assert model.layer(CASES[2].layer).state_layout.alpha_of(1) == 1.0
    # Autocast is put in front of the model's forward by accelerate, and the host must run inside of it.
    assert set(seen) == ({torch.bfloat16} if bf16 else {torch.float32})
