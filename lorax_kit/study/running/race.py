"""Trains trials rung by rung and stops those that a rule gives up; their places are filled by those that go on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorax_kit.study.design.stopping import Stopping
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.groups import Group
from lorax_kit.study.programs.progress import Progress, joined, parted
from lorax_kit.study.programs.slices import Layout
from lorax_kit.study.running.cluster import Cluster
from lorax_kit.study.running.session import Job, Session


class Race:
    """The groups of a study under an early-stopping rule.

    All trials that are still in are trained to a rung before the rule decides; then they are packed anew, into groups
    of the same layout, which the same compiled program goes on with; it does not compute the empty slices. A stack of
    which half a slice or less is left is packed into one of just so many.

    Args:
      session: that keeps what trials came to.
      trainer: that trains: the session, or a cluster.
      rule: that stops.
      stacks: the groups of each stack.
    """

    def __init__(
        self, session: Session, trainer: Session | Cluster, rule: Stopping, stacks: Sequence[Sequence[Group]]
    ) -> None:
        self.session, self.trainer, self.rule, self.store = session, trainer, rule, session.store
        self.groups = [list(groups) for groups in stacks]
        self.slots: dict[str, Progress] = {}
        self.histories: dict[str, list[float]] = {}
        self.diverged: list[Trial] = []

    def run(self) -> None:
        """Train to the end, and write the row of every trial."""
        steps = self.session.study.steps
        rungs = self.rule.rungs(steps)
        for number, until in enumerate(rungs):
            in_play = [group for groups in self.groups for group in groups]
            self._train(in_play, until, number)
            if until < steps:
                self._decide([trial for group in in_play for trial in group.trials], until)
        self.trainer.finish(
            [Job(group, "", steps, self._standing(group)) for groups in self.groups for group in groups]
        )
        self.store.drop_rungs()

    def _train(self, groups: Sequence[Group], until: int, rung: int) -> None:
        """Train groups to a rung, but those that an earlier call has trained."""
        jobs, places = [], []
        for i, group in enumerate(groups, 1):
            place = f"{rung}_{i}"
            progress = self.store.load_progress([trial.name for trial in group.trials], group.size, place)
            if progress is not None:
                self._stand(group, progress)
                continue
            label = f"to step {until}, group {i} of {len(groups)}, {len(group.trials)} trials"
            jobs.append(Job(group, label, until, self._standing(group) if rung else None))
            places.append(place)
        for i, progress in self.trainer.train(jobs):
            group = jobs[i].group
            self.store.save_progress([trial.name for trial in group.trials], progress, places[i])
            self.store.drop_progress()
            self._stand(group, progress)

    def _standing(self, group: Group) -> Progress:
        return joined([self.slots[trial.name] for trial in group.trials], group.size)

    def _stand(self, group: Group, progress: Progress) -> None:
        slots = parted(progress, len(group.trials))
        self.slots |= {trial.name: slot for trial, slot in zip(group.trials, slots, strict=True)}

    def _decide(self, trials: list[Trial], until: int) -> None:
        """Stop the diverged, ask the rule, and pack those that go on."""
        metric = self.session.problem.chief
        for trial in trials:
            slot = self.slots[trial.name]
            value = math.nan if slot.failed[0] else metric.sign * slot.evaluations[-1][1][0][metric.name]
            self.histories.setdefault(trial.name, []).append(value)
        for trial in self.diverged:  # a condition is judged by all its seeds, the lost ones as the worst
            self.histories[trial.name].append(math.nan)
        everyone = [*trials, *self.diverged]
        lost = {trial.name for trial in everyone if self.slots[trial.name].failed[0]}
        left = {trial.name for trial in everyone} - lost
        chosen = self.rule.survivors(everyone, self.histories) if left else set()
        self.diverged = [trial for trial in everyone if trial.name in chosen & lost]
        going = chosen - lost
        for i, groups in enumerate(self.groups):
            if not groups:
                continue
            members = [trial for group in groups for trial in group.trials]
            for trial in members:
                if trial.name not in going:
                    self.session.outcomes.keep_stopped(groups[0], trial, self.slots[trial.name])
            self.groups[i] = _packed([trial for trial in members if trial.name in going], groups[0])


def _packed(trials: Sequence[Trial], like: Group) -> list[Group]:
    """Groups laid out like `like`, or one of just so many trials where they are half of its slice or less."""
    layout = like.layout
    if trials and len(trials) <= layout.width // 2:
        each = -(-len(trials) // layout.devices)
        layout = Layout(each * layout.devices, each, layout.devices)
    return [
        like._replace(trials=list(trials[i : i + layout.size]), layout=layout)
        for i in range(0, len(trials), layout.size)
    ]
