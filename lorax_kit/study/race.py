"""Trains trials rung by rung and stops those that a rule gives up; their places are filled by those that go on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorax_kit.study.design.stopping import Stopping
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.groups import Group
from lorax_kit.study.programs.progress import Progress, joined, parted
from lorax_kit.study.programs.slices import Layout
from lorax_kit.study.session import Session


class Race:
    """The groups of a study under an early-stopping rule.

    All trials that are still in are trained to a rung before the rule decides; then they are packed anew, into groups
    of the same layout, which the same compiled program goes on with; it does not compute the empty slices. A stack of
    which half a slice or less is left is packed into one of just so many.

    Args:
      session: that trains.
      rule: that stops.
      stacks: the groups of each stack.
    """

    def __init__(self, session: Session, rule: Stopping, stacks: Sequence[Sequence[Group]]) -> None:
        self.session, self.rule, self.store = session, rule, session.store
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
            for i, group in enumerate(in_play, 1):
                label = f"to step {until}, group {i} of {len(in_play)}, {len(group.trials)} trials"
                self._train(group, until, f"{number}_{i}", label)
            if until < steps:
                self._decide([trial for group in in_play for trial in group.trials], until)
        for groups in self.groups:
            for group in groups:
                slots = joined([self.slots[trial.name] for trial in group.trials], group.size)
                self.session.keep(group, self.session.finished(group, slots), new=True)
        self.store.drop_rungs()

    def _train(self, group: Group, until: int, place: str, label: str) -> None:
        names = [trial.name for trial in group.trials]
        found = self.store.load_progress(names, group.size, place)
        if found is None:
            before = joined([self.slots[n] for n in names], group.size) if names[0] in self.slots else None
            found = self.session.train_until(group, until, label, before)
            self.store.save_progress(names, found, place)
            self.store.drop_progress()
        self.slots |= dict(zip(names, parted(found, len(names)), strict=True))

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
                    self.session.keep_stopped(groups[0], trial, self.slots[trial.name])
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
