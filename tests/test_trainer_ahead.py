"""`rollout.ahead`: a thread draws the next batch, by the policy as it was before the update."""

import threading
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch
from tiny_runs import rows, weights

from fastpo.trainer.config import ModelConfig
from fastpo.trainer.model.loading import make_policy
from fastpo.trainer.run import recipe
from fastpo.trainer.run.errors import RecipeError
from fastpo.trainer.source import Source, copy_of
from fastpo.trainer.update import Learner

SURPLUS = ("algorithm.carry_surplus=true", "rollout.prompts=5", "seed=2")


@contextmanager
def without_a_thread(self):
    """The same schedule, one thing after the other, by the policy itself."""
    self._next = Future()
    batch = self._draw(self.policy)
    batch.fresh = False
    self._next.set_result(batch)
    yield


def draw_after_the_update(monkeypatch):
    """The thread comes last: what it draws by is no longer the policy."""
    learned, draw, learn = threading.Event(), Source._draw_ahead, Learner.learn

    def late(self):
        assert learned.wait(60)
        learned.clear()
        return draw(self)

    def learns(self, *arguments, **options):
        try:
            return learn(self, *arguments, **options)
        finally:
            learned.set()

    monkeypatch.setattr(Source, "_draw_ahead", late)
    monkeypatch.setattr(Learner, "learn", learns)


def results(run):
    """All numbers but those of the clock, and the weights."""
    clock = ("time", "per_second", "memory")
    numbers = [
        {name: value for name, value in row.items() if not any(part in name for part in clock)}
        for row in rows(run)
    ]
    return numbers, {name: value.tolist() for name, value in weights(run).items()}


@pytest.mark.parametrize(
    "options",
    [
        ("algorithm.dynamic_sampling=false",),
        (*SURPLUS, "algorithm.correction.mode=truncate", "optim.updates_per_batch=2"),
    ],
    ids=["plain", "all"],
)
def test_who_is_faster_changes_nothing(tiny, monkeypatch, options):
    """The thread, the same schedule without one, and a thread that waits for the update."""
    options = ("steps=4", "rollout.ahead=true", "existing=move_aside", *options)
    threaded = results(tiny(*options))
    with monkeypatch.context() as patch:
        patch.setattr(Source, "drawing_ahead", without_a_thread)
        assert results(tiny(*options)) == threaded
    draw_after_the_update(monkeypatch)
    assert results(tiny(*options)) == threaded


def test_a_batch_drawn_ahead_is_one_step_off_and_says_so(tiny):
    """REGRESSIONS 69: its ratio is that to the policy which drew it, from the first update on."""
    options = ("steps=3", "algorithm.preset=grpo", "existing=move_aside")
    at_once, ahead = (
        [row for row in rows(tiny(*options, *more)) if "reward" in row]
        for more in ((), ("rollout.ahead=true",))
    )
    lag = "sampling/sampling_logp_difference/mean"  # of the sampler and the policy that learns
    assert all(row["old_kl"] == 0 and row[lag] < 1e-6 for row in (*at_once, ahead[0]))
    assert all(row["old_kl"] > 1e-6 and row[lag] > 1e-3 for row in ahead[1:])
    assert [row["reward"] for row in at_once] != [row["reward"] for row in ahead]


def test_what_was_drawn_ahead_is_dropped_by_a_recipe_with_other_groups(tiny):
    run = tiny("rollout.ahead=true", "algorithm.preset=grpo")
    run = tiny("--resume", "rollout.ahead=true", "steps=4", "rollout.group_size=6")
    assert [row["old_kl"] > 0 for row in rows(run) if "reward" in row] == [False, True, False, True]


@pytest.mark.parametrize("key", ["rollout.ahead", "algorithm.carry_surplus"])
def test_log_probs_that_forget_who_sampled_are_refused(key):
    """REGRESSIONS 70: recomputed by the policy that learns, without a correction."""
    settings = [f"{key}=true", "optim.old_logprobs=recompute"]
    with pytest.raises(RecipeError, match=r"set algorithm\.correction\.mode=truncate"):
        recipe.load(None, settings)
    recipe.load(None, [*settings, "algorithm.correction.mode=truncate"])


def test_a_copy_shares_what_is_not_trained_and_what_is_tied():
    """And runs on its own weights, whatever wraps its layers."""
    sizes = ModelConfig(hidden_size=32, layers=1, heads=2, gradient_checkpointing=True)
    policy = make_policy(sizes, torch.device("cpu"), alphabet="01", stop=None)
    frozen = policy.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    sampler = copy_of(policy)
    copied = sampler.model
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    shared = {name for name, p in copied.named_parameters() if p.data_ptr() == frozen.data_ptr()}
    assert shared == {"model.layers.0.mlp.up_proj.weight"}
    ids = torch.tensor([[3, 4, 3]])
    before = sampler.hidden_states(ids)
    for parameter in policy.model.parameters():
        if parameter is not frozen:
            parameter.data.fill_(torch.nan)
    assert torch.equal(sampler.hidden_states(ids), before)
