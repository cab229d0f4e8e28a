"""Moments of 8 bits: by torchao, and by a stand-in with its interface where that is missing."""

import io
import sys
import types

import pytest
import torch
from learner_cases import CPU, samples_of

import fastpo
from fastpo.trainer.config import ModelConfig, OptimConfig
from fastpo.trainer.model.loading import make_policy
from fastpo.trainer.run import recipe
from fastpo.trainer.run.errors import RecipeError
from fastpo.trainer.update import Learner, Sums


class Moment:
    """`torchao.optim.subclass_8bit.OptimState8bit`, with evenly spaced values."""

    def __init__(self, shape, block):
        self.codes = torch.zeros(shape, dtype=torch.uint8)
        self.scale, self.qmap = torch.zeros(self.codes.numel() // block), torch.arange(256) / 255
        self.qmap = 2 * self.qmap - 1

    def __len__(self):
        return len(self.codes)

    def float(self):
        values = self.qmap[self.codes.long()].view(len(self.scale), -1) * self.scale[:, None]
        return values.view(self.codes.shape)

    def copy_(self, values):
        blocks = values.view(len(self.scale), -1)
        self.scale.copy_(blocks.abs().amax(1).clip(1e-12))
        codes = (blocks / self.scale[:, None] + 1) * 127.5
        self.codes.copy_(codes.round().view(self.codes.shape))
        return self


class AdamW8bit(torch.optim.Optimizer):
    """`torchao.optim.AdamW8bit`: as it is called, what it keeps, that its rate is a tensor."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {"lr": torch.tensor(lr), **settings})

    def _new_buffer(self, p, signed):
        quantized = p.numel() >= 4096 and p.numel() % 256 == 0
        return Moment(p.shape, 256) if quantized else torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            assert isinstance(group["lr"], torch.Tensor)
            for p in group["params"]:
                state, (first, second) = self.state[p], group["betas"]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": self._new_buffer(p, True)}
                    state["exp_avg_sq"] = self._new_buffer(p, False)
                state["step"] += 1
                mean = state["exp_avg"].float().lerp(p.grad, 1 - first)
                square = state["exp_avg_sq"].float().lerp(p.grad**2, 1 - second)
                state["exp_avg"].copy_(mean), state["exp_avg_sq"].copy_(square)
                mean = mean / (1 - first ** state["step"])
                square = square / (1 - second ** state["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * mean / (square.abs().sqrt() + group["eps"]))


@pytest.fixture(params=["stand-in", pytest.param("torchao", marks=[pytest.mark.peer])])
def eight_bits(request, monkeypatch):
    if request.param == "torchao":
        monkeypatch.setattr("torch.compile", lambda function, **_: function)  # it takes minutes
        pytest.importorskip("torchao")
    else:
        make("adamw")  # transformers has looked for torchao, in vain
        module = types.SimpleNamespace(AdamW8bit=AdamW8bit)
        monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
        monkeypatch.setitem(sys.modules, "torchao.optim", module)


def make(name, like=None):
    torch.manual_seed(0)
    model = ModelConfig(hidden_size=64, layers=1, heads=2)
    policy = make_policy(model, CPU, alphabet="0123456789=", stop=None)
    optim = OptimConfig(name=name, learning_rate=1e-2, weight_decay=0.1)
    learner = Learner(policy, optim, fastpo.dapo(), 0.8)
    if like is not None:  # by way of a file
        file = io.BytesIO()
        torch.save([like.state_dict(), like.policy.model.state_dict()], file)
        file.seek(0)
        state, weights = torch.load(file, weights_only=True)
        policy.model.load_state_dict(weights)
        learner.load_state_dict(state)
    return learner


def parameters(learner):
    return torch.cat([p.detach().flatten() for p in learner.parameters])


def test_moments_of_eight_bits_outlive_a_checkpoint_bit_for_bit(eight_bits):
    """And float32 ones go on as such, and the other way round, within their rounding."""
    first = make("adamw_8bit")
    samples = samples_of(first.policy)
    for _ in range(3):
        first.update(samples, Sums(), on_policy=False)
    same, full = make("adamw_8bit", first), make("adamw", first)
    back = make("adamw_8bit", full)
    start = parameters(first)
    for learner in (first, same, full, back):
        learner.update(samples, Sums(), on_policy=False)
    kept = [type(state["exp_avg"]) for state in same.optimizer.state.values()]
    assert kept.count(torch.Tensor) < len(kept) and same.optimizer.param_groups[0]["lr"] == 1e-2
    assert torch.equal(parameters(same), parameters(first))
    moved = (parameters(first) - start).norm()
    for other in (full, back):
        assert (parameters(other) - parameters(first)).norm() < 0.1 * moved


def test_a_missing_package_and_the_old_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(RecipeError, match=r"adamw_8bit needs torchao: pip install torchao$"):
        make("adamw_8bit")
    for given, name in (("true", "adamw_fused"), ("false", "adamw")):
        assert recipe.load(None, [f"optim.fused={given}"]).optim.name == name


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["optim.fused=yes"], "optim.fused is 'yes', expected true or false"),
        (["optim.fused=1"], "optim.fused is 1, expected true or false"),
        (["optim.fused=true", "optim.name=adamw"], "optim.name is 'adamw': set optim.fused=false"),
    ],
)
def test_what_an_older_recipe_cannot_have_meant_is_refused(overrides, line):
    """It was dropped without a word."""
    with pytest.raises(RecipeError, match=line):
        recipe.load(None, overrides)
    changed = recipe.load(None, ["optim.fused=false", "optim.name=adamw_8bit"])
    assert changed.optim.name == "adamw_8bit"
