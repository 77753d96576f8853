"""Old names of fields, so that a command with an old name is told the new one."""

_MOVED = {
    "objective.loss": "reduction entropy_coef",
    "objective.loss.options": (
        "penalty_scope clip_low clip_high dual_clip min_ratio max_ratio epsilon beta log_clip keep_low keep_high "
        "divergence_low divergence_high tau_positive tau_negative power_positive decay_positive power_negative decay_negative"
    ),
    "objective.dual": "adaptive",
    "objective.advantage": "discount trace_decay value_coef value_clip",
    "objective.groups": "zero_variance max_resamples verifier_errors truncated overlong_buffer overlong_penalty",
    "objective.correction": "max_weight min_weight",
    "task.arithmetic": "min_operands max_operands num_digits",
    "task.text": "train validation test data_dir max_response_length",
}
_RENAMED = {
    "objective.loss": "objective.loss.name",
    "objective.variance_coef": "objective.dual.coef",
    "objective.variance_budget": "objective.dual.budget",
    "objective.dual_step": "objective.dual.step",
    "objective.dual_max_step": "objective.dual.max_step",
    "objective.dual_rule": "objective.dual.rule",
    "objective.dual_signal": "objective.dual.signal",
    "objective.max_variance_coef": "objective.dual.max_coef",
    "objective.normalize_variance_coef": "objective.dual.normalize",
    "objective.m2_budget": "objective.loss.options.budget",
    "objective.advantage": "objective.advantage.estimator",
    "objective.advantage_scale": "objective.advantage.scale",
    "objective.whiten_advantages": "objective.advantage.whiten",
    "objective.kl_coef": "objective.kl.coef",
    "objective.kl_to": "objective.kl.to",
    "objective.kl_in": "objective.kl.where",
    "objective.kl_estimator": "objective.kl.estimator",
    "objective.kl_corrected": "objective.kl.corrected",
    "objective.kl_target": "objective.kl.target",
    "objective.correction": "objective.correction.mode",
    "objective.correction_scope": "objective.correction.scope",
    "trainer.eval_temperature": "evaluation.temperature",
    "trainer.eval_top_p": "evaluation.top_p",
    "trainer.eval_batch_size": "evaluation.batch_size",
    "trainer.tensorboard": "trainer.trackers",
    "alarms.max_second_moment": "alarms.max_ratio_variance",
}
NEW_NAMES = _RENAMED | {
    f"{section.split('.')[0]}.{name}": f"{section}.{name}"
    for section, names in _MOVED.items()
    for name in names.split()
}
_OF_SWEEPS = {
    f"sweep.{name}": f"part of sweep.cells, in the config file: {cells}"
    for name, cells in {
        "presets": 'grid.values("objective.name", ...)',
        "variance_coefs": 'grid.values("objective.dual.coef", ...) with objective.name r2vpo_fixed',
        "variance_budgets": 'grid.values("objective.dual.budget", ...) with objective.name r2vpo',
        "clips": 'grid.values(("objective.loss.options.clip_low", "objective.loss.options.clip_high"), ...)',
    }.items()
}


def new_name(path: str) -> str | None:
    """The new name of a field, or how to say it now, if `path` is an old one; without `config.` in front."""
    return NEW_NAMES.get(path) or _OF_SWEEPS.get(path)
