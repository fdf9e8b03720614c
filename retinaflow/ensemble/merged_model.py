"""What a merge leaves as a model: the members' checkpoints with their stored calibrators, and how they are joined.

The stored calibrators are those of ``calibrators.json``, fitted on all images; the merge itself is evaluated with
cross-fitted ones. Without calibration, and with the calibrators of an earlier merge, both are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retinaflow.data.frequency_bins import ClassBins
from retinaflow.ensemble.calibrated_members import CalibratedMember
from retinaflow.ensemble.members import Ensemble
from retinaflow.inference.checkpoint import Checkpoint
from retinaflow.inference.merged_checkpoint import MergedCheckpoint, MergedMember
from retinaflow.runs.run import CHECKPOINTS
from retinaflow.settings.commands import MergeConfig
from retinaflow.settings.model_settings import JoinSettings, OverlapSettings

FILE = Path(CHECKPOINTS) / "best.pt"
"""Path of the model in the folder of a merge: that of a training."""


def merged_model(
    ensemble: Ensemble, calibrated: Sequence[CalibratedMember], bins: ClassBins, config: MergeConfig
) -> MergedCheckpoint | str:
    """The members as one model; the reason where a member has none."""
    if ensemble.without_model is not None:
        return ensemble.without_model
    members = []
    for one in calibrated:
        assert isinstance(one.member.model, Checkpoint)
        calibrators = tuple(row.calibrator for row in one.classes)
        members.append(MergedMember(one.member.model, calibrators, one.member.run_id))
    return MergedCheckpoint(
        members=tuple(members),
        join=config.part(JoinSettings),
        taxonomy=ensemble.evaluated.taxonomy,
        bins=bins,
        settings=_settings(ensemble, [member.checkpoint for member in members], config),
        data_digest=ensemble.evaluated.digest[:16],
    )


def _settings(ensemble: Ensemble, models: Sequence[Checkpoint], config: MergeConfig) -> dict[str, Any]:
    """The settings of the first member's training, for the classes of all and with the limits of the merge."""
    precisions = {str(model.settings["precision"]) for model in models}
    own = {
        **models[0].settings,
        **{name: getattr(config, name) for name in OverlapSettings.model_fields},
        # Those of the members have dropped what is lower, and calibrated scores are of another scale.
        "score_threshold": 0.0,
        "precision": precisions.pop() if len(precisions) == 1 else "auto",
        "group_of_weight": ensemble.group_of_weight,
        "class_group": ",".join(ensemble.evaluated.taxonomy.ids) if ensemble.has_some_classes else "all",
    }
    of_training = ensemble.members[0].run.stored.evaluated_from["command"] == "train"
    return own if of_training else {**own, "data": None}
