"""Every preset of the family, some with their options combined: what a loss path must get right."""

from __future__ import annotations

import fastpo

PRESETS: dict[str, fastpo.Objective] = {
    "ppo": fastpo.ppo(),
    "ppo_dual_clip": fastpo.ppo(ratio_max=3.0),
    "grpo": fastpo.grpo(),
    "grpo_kl": fastpo.grpo(kl_coef=0.04),
    "dapo": fastpo.dapo(),
    "dapo_entropy": fastpo.dapo(entropy_coef=0.01),
    "dapo_all": fastpo.dapo(
        ratio_max=4.0, kl_coef=0.1, kl_estimator="k3+", kl_ratio_weighted=True, entropy_coef=0.05
    ),
    "dr_grpo": fastpo.dr_grpo(max_length=64),
    "bnpo": fastpo.bnpo(),
    "gspo": fastpo.gspo(clip_low=0.05, clip_high=0.05),
    "luspo": fastpo.luspo(clip_low=0.05, clip_high=0.05),
    "cispo": fastpo.cispo(),
    "sapo": fastpo.sapo(),
    "gmpo": fastpo.gmpo(kl_coef=0.1, entropy_coef=0.02),
    "vespo": fastpo.vespo(),
    "gpg": fastpo.gpg(),
    "reinforce": fastpo.reinforce(kl_coef=0.1, kl_estimator="abs"),
}
