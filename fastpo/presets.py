"""The named objectives of the literature, one function each.

Every preset returns an `Objective` and takes any of its fields as an override, e.g.
`dapo(clip_high=0.3, kl_coef=1e-3)`. Notation: d = logp - old, r = exp(d), A the advantage, sg() a
stopped gradient, B sequences of len tokens. Losses are minimized; a formula is one token's loss.

Differences from TRL 1.16 and verl 0.9 that hold for every preset:

* d is clamped to +-20 before exp, in value and gradient. TRL does not clamp, so that a *clipped*
  token with d > 709 (float64; 88 in float32) has gradient NaN there and 0 here. verl clamps token
  ratios alike, and caps its sequence ratio at exp(10).
* What stands in masked slots is never used; both multiply it by 0, so that NaN there spreads.
* A mean over sequences counts all B, as in TRL; verl leaves fully masked sequences out of its
  means (give their number as `normalizer` to do the same).
* The k3 KL estimate saturates at ref - logp = 20; TRL's overflows, and verl's value stops at 10.

Raises (every preset): TypeError for an unknown override, naming the nearest field; what `Objective`
raises for bad values.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastpo.objective import Objective, unknown_option, without_meaning

__all__ = [
    "aspo",
    "bnpo",
    "ce_gppo",
    "cispo",
    "dapo",
    "dppo",
    "dr_grpo",
    "dro",
    "gmpo",
    "gpg",
    "grpo",
    "gspo",
    "gspo_token",
    "icepop",
    "ipo",
    "luspo",
    "ppo",
    "reinforce",
    "sapo",
    "topr",
    "vespo",
]

_FIELDS = tuple(field.name for field in fields(Objective))


def ppo(**overrides: Any) -> Objective:
    """PPO's clipped surrogate: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); token mean.

    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; clip 0.2. The dual clip of arXiv
    1912.09729 is `ratio_max`, off here: verl's "vanilla" has it on at clip_ratio_c = 3, and counts
    a ratio exactly on that bound half. TRL 1.16: `loss_type="bnpo"`.
    """
    return _make("ppo", overrides)


def grpo(**overrides: Any) -> Objective:
    """GRPO: PPO's surrogate, mean over sequences of the mean over their tokens.

    Source: Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, eq. 3. `kl_coef` is 0 here as in TRL
    and verl; the paper uses 0.04 with the k3 estimator. TRL 1.16: `loss_type="grpo"`. verl:
    "vanilla" with seq-mean-token-mean, which divides by len + 1e-8.
    """
    return _make("grpo", overrides, aggregation="sequence_mean")


def dapo(**overrides: Any) -> Objective:
    """DAPO: PPO's surrogate with the upper clip raised, 0.2 / 0.28; token mean over the batch.

    Source: Yu et al. 2025, arXiv 2503.14476, eq. 8 to 12. Give `normalizer` (tokens of the global
    batch) under gradient accumulation or data parallelism, where TRL 1.16 (`loss_type="dapo"`)
    takes `num_items_in_batch`. TRL's epsilon_high defaults to 0.2.
    """
    return _make("dapo", overrides, clip_high=0.28)


def dr_grpo(**overrides: Any) -> Objective:
    """Dr. GRPO: PPO's surrogate, sum over tokens / (B * max_length), free of the length bias.

    Source: Liu et al. 2025, arXiv 2503.20783. `max_length=None` takes T of a [B, T] batch, as
    verl's seq-mean-token-sum-norm does; TRL 1.16 (`loss_type="dr_grpo"`) takes its
    max_completion_length. Pair it with advantages that are not divided by the standard deviation.
    """
    return _make("dr_grpo", overrides, aggregation="constant")


def bnpo(**overrides: Any) -> Objective:
    """BNPO: PPO's surrogate, mean over the tokens of the local batch (give no `normalizer`).

    Source: TRL 1.16 `loss_type="bnpo"`; after Xiao et al. 2025, arXiv 2506.02864, whose beta
    normalization concerns the advantages.
    """
    return _make("bnpo", overrides)


def gspo(**overrides: Any) -> Objective:
    """GSPO: PPO's surrogate on s = exp(mean_t d), one ratio per sequence; mean over sequences.

    Source: Zheng et al. 2025, arXiv 2507.18071, eq. 5 to 7; clip 3e-4 / 4e-4 from its section 5.1.
    TRL 1.16: `loss_type="grpo", importance_sampling_level="sequence"`. verl's "gspo" is
    `gspo_token`, the same gradient where A is constant over a sequence.
    """
    return _make(
        "gspo",
        overrides,
        ratio_level="sequence",
        aggregation="sequence_mean",
        clip_low=3e-4,
        clip_high=4e-4,
    )


def gspo_token(**overrides: Any) -> Objective:
    """GSPO-token: PPO's surrogate on sg(s) p_t / sg(p_t), s = exp(mean_t d): s for every token.

    The loss has GSPO's value, but token t's gradient is -A_t w_t s with its own advantage and
    weight, where `gspo` spreads the sequence's mean over its tokens. Source: arXiv 2507.18071,
    section 4.3; clip as `gspo`. verl: "gspo", which caps s at exp(10). Not in TRL 1.16.
    """
    return _make(
        "gspo_token",
        overrides,
        ratio_level="sequence_token",
        aggregation="sequence_mean",
        clip_low=3e-4,
        clip_high=4e-4,
    )


def luspo(**overrides: Any) -> Objective:
    """LUSPO: GSPO with every sequence's loss scaled by its length; mean over sequences of the sums.

    Source: arXiv 2602.05261; clip 2e-3 / 2.5e-3 from its section 5.1, as TRL's paper index has it.
    TRL 1.16: `loss_type="luspo", importance_sampling_level="sequence"`; its own default, the token
    level, is no LUSPO. No such loss in verl.
    """
    return _make(
        "luspo",
        overrides,
        ratio_level="sequence",
        aggregation="sequence_sum",
        clip_low=2e-3,
        clip_high=2.5e-3,
    )


def cispo(**overrides: Any) -> Objective:
    """CISPO: -sg(clip(r, ratio_min, ratio_max)) A logp; token mean. Every token has a gradient.

    Source: MiniMax-M1, arXiv 2506.13585, eq. 4; the bound 5 from ScaleRL, arXiv 2510.13786; no
    lower bound, as in both. `ratio_max` is the bound on r itself: TRL 1.16's `epsilon_high` with
    `loss_type="cispo"`; in verl the bounds are 1 - clip_ratio_low and 1 + clip_ratio_high. As in
    TRL and Liger, a bounded token counts as clipped where A > 0 (below the lower bound: where
    A < 0); verl counts all.
    """
    return _make("cispo", overrides, surrogate="cispo", ratio_max=5.0)


def dppo(**overrides: Any) -> Objective:
    """DPPO: -sg(min(r, 20)) A logp, dropped where a divergence shows that p has moved far enough.

    Dropped are A > 0 with D > clip_high and A < 0 with D < -clip_low. `gate="tv"`: D = p - p_old,
    bounds 0.15; `gate="kl"`: D = KL of the two Bernoulli distributions (p_old, p) with the sign of
    p - p_old, bounds 0.05. Token mean. Source: Qi et al. 2026, arXiv 2602.04879; the bounds from
    the script that its authors gave verl, 20 from verl's code (theirs has 10, their script none).
    verl: "dppo_tv" and "dppo_kl", where `ratio_max` is clip_ratio_c and A = 0 counts as clipped by
    the lower bound, at no change of the loss. Not in TRL 1.16. prime-rl's default loss is
    `dppo(clip_low=0.2, clip_high=0.2, ratio_max=None, old_kl_coef=2e-3)` in its gradient.
    """
    bound = 0.05 if overrides.get("gate") == "kl" else 0.15
    return _gated("dppo", overrides, gate="tv", clip_low=bound, clip_high=bound, ratio_max=20.0)


def ipo(**overrides: Any) -> Objective:
    """IPO: the gradient of -r A, dropped where |p - p_old| > 0.1 whatever the sign of A, + tau d^2.

    tau is half of `old_kl_coef`, 1e-3 by default; token mean. Source: the code of prime-rl, its
    loss "ipo" (INTELLECT Policy Optimization; until June 2026 with 0.2), whose value is -r A where
    it is -sg(r) A logp here (the gradients are equal), and which sums over tokens; tau d^2 is from
    Kimi K2.5, arXiv 2602.02276. Neither in TRL 1.16 nor in verl 0.9.
    """
    bounds = {"clip_low": 0.1, "clip_high": 0.1}
    return _gated("ipo", overrides, gate="tv", gate_two_sided=True, old_kl_coef=2e-3, **bounds)


def icepop(**overrides: Any) -> Objective:
    """IcePop on the current policy: -sg(r) A logp, dropped outside r in [0.5, 5], any sign of A.

    Token mean. Source: Ling team, arXiv 2510.18855 (Ring-1T); alpha 0.5 and beta 5 as in verl's
    presets of that name. There r is the training engine's over the rollout's: pass the rollout's
    log-probs as `old_logprobs`. To mask by (old, rollout) beside another objective, as verl and TRL
    do: `rollout_correction`.
    """
    bounds = {"clip_low": 0.5, "clip_high": 4.0}
    return _gated("icepop", overrides, gate="ratio", gate_two_sided=True, **bounds)


def topr(**overrides: Any) -> Objective:
    """TOPR: -A logp where A > 0, -sg(min(r, 1)) A logp where A < 0; token mean.

    Source: Le Roux et al. 2025, arXiv 2503.14286, eq. 8, whose ratio is the whole sequence's; per
    token as in ROLL, which tells the cases apart by the sign of the episode's score (the same for
    advantages of that sign). Neither in TRL 1.16 nor in verl 0.9.
    """
    return _gated("topr", overrides, ratio_power_pos=0, ratio_max=1.0)


def aspo(**overrides: Any) -> Objective:
    """ASPO: -sg(min(1 / r, 3)) A logp where A > 0, -sg(min(r, 3)) A logp where A < 0; token mean.

    The flipped ratio lifts tokens that have fallen behind. A token with A > 0 and r > 1 + clip_high
    or A < 0 and r < 1 - clip_low is dropped; one whose weight is bounded by `ratio_max` keeps its
    gradient (the paper's soft dual clip; verl's drops it). Source: Wang et al. 2025, arXiv
    2510.06062, and its code (Archer2.0), with 3 on both sides; there the most uncertain fifth of a
    completion's tokens has the bounds 0.4 / 0.4: pass `clip_bounds`. Neither in TRL 1.16 nor in
    verl 0.9.
    """
    return _gated("aspo", overrides, gate="ratio", ratio_power_pos=-1, ratio_max=3.0)


def ce_gppo(**overrides: Any) -> Objective:
    """CE-GPPO: PPO whose clipped tokens keep b1 (1 - clip_low) or b2 (1 + clip_high) as weight.

    b1 is `gate_keep_low`, 0.75 (A < 0 and r < 1 - clip_low), b2 `gate_keep_high`, 1; token mean.
    GPPO (arXiv 2508.07629) is b1 = b2 = 1. Source: Su et al. 2025, arXiv 2509.20712, and its code:
    b1 0.75 for 7B, 0.5 for 1.5B, clip 0.2 / 0.2. That code has the value -r A inside, with the same
    gradient, and a dual clip at 10, which drops A < 0 with r > 10; there is none here. Neither in
    TRL 1.16 nor in verl 0.9.
    """
    return _gated("ce_gppo", overrides, gate="ratio", gate_keep_low=0.75, gate_keep_high=1.0)


def dro(**overrides: Any) -> Objective:
    """DRO: -A logp + (beta / 2) d^2, beta = `old_kl_coef`; token mean.

    Source: Richemond et al. 2024, arXiv 2405.19107, in the form of Kimi k1.5 (2501.12599) and of
    Tinker, whose documentation has beta 0.05. verl: "dro", which has no default for dro_beta and
    multiplies the importance weights into both terms, here into A alone.
    """
    return _make("dro", overrides, surrogate="reinforce", old_kl_coef=0.05)


def sapo(**overrides: Any) -> Objective:
    """SAPO: -A (4 / tau) sigmoid(tau (r - 1)), a soft gate; mean over sequences of token means.

    tau is `sapo_tau_pos` (1) where A > 0, else `sapo_tau_neg` (1.05). Source: arXiv 2511.20347. As
    TRL 1.16 and verl, except that TRL holds tau in float32.
    """
    return _make("sapo", overrides, surrogate="sapo", aggregation="sequence_mean")


def gmpo(**overrides: Any) -> Objective:
    """GMPO: -A exp(mean_t clip(d)), the geometric mean of the clipped ratios; mean over sequences.

    d is clipped to [-clip_low, clip_high], pessimistically by the sign of A, 0.4 / 0.4 in log space
    as in the paper. Source: Zhao et al. 2025, arXiv 2507.20673. verl: "geo_mean", which divides by
    len + 1e-8, adds 1e-10 to importance weights and has no bound on the exponent. TRL 1.16: under
    `trl.experimental`.
    """
    return _make(
        "gmpo",
        overrides,
        surrogate="gmpo",
        aggregation="sequence_mean",
        clip_low=0.4,
        clip_high=0.4,
    )


def vespo(**overrides: Any) -> Objective:
    """VESPO: -sg(phi(W)) A logp, phi(W) = e^lambda W^k e^(-lambda W), W = exp(sum_t d); token mean.

    k and lambda by the sign of A. Importance weights multiply W, not A. Source: arXiv 2602.10693,
    TRL 1.16 `loss_type="vespo"`, with two differences: TRL sums the logs of per-token importance
    weights over masked slots too, and turns a NaN phi into 0, where a NaN stays visible here.
    """
    return _make("vespo", overrides, surrogate="vespo")


def gpg(**overrides: Any) -> Objective:
    """GPG: -A logp; token mean. Source: Chu et al. 2025, arXiv 2504.02546; verl "gpg"."""
    return _make("gpg", overrides, surrogate="reinforce")


def reinforce(**overrides: Any) -> Objective:
    """REINFORCE: -A logp; token mean. Source: Williams 1992, doi 10.1007/BF00992696.

    verl's `compute_policy_loss_reinforce` is the same with `aggregation="sequence_sum"`.
    """
    return _make("reinforce", overrides, surrogate="reinforce")


def _gated(name: str, overrides: dict[str, Any], **defaults: Any) -> Objective:
    return _make(name, overrides, surrogate="gate", **defaults)


def _make(name: str, overrides: dict[str, Any], **defaults: Any) -> Objective:
    for key in overrides:
        if key not in _FIELDS:
            raise unknown_option(name, key)
    chosen = {"surrogate": "clip", "gate": "none", **defaults, **overrides}
    # With another surrogate or gate the preset's own numbers for the old one mean nothing.
    unused = without_meaning(chosen["surrogate"], chosen["gate"]) - overrides.keys()
    return Objective(**{"name": name} | {k: v for k, v in chosen.items() if k not in unused})
