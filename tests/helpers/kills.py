"""Ways to kill a run before its end, in a separate process."""

from __future__ import annotations

import os
import signal

from holdfast.machine.files import as_line
from holdfast.machine.store import Store
from runs import run


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(recipe, out, arm):
    arm()
    run(recipe, out)


def before_the_marker(kind, nth=1):
    """Kill after the work of the nth step of that kind, before `step.json` is written."""

    def arm():
        complete, count = Store.complete, [0]

        def dying(self, step, record):
            count[0] += step.startswith(kind)
            if step.startswith(kind) and count[0] == nth:
                kill()
            return complete(self, step, record)

        Store.complete = dying

    return arm


def in_training(stage, step):
    """Kill after an optimizer step."""

    def arm():
        from holdfast.pipeline.monitor import TrainingMonitor

        on_step_end = TrainingMonitor.on_step_end

        def dying(self, args, state, control, **kwargs):
            if stage in str(args.output_dir) and state.global_step == step:
                kill()
            on_step_end(self, args, state, control, **kwargs)

        TrainingMonitor.on_step_end = dying

    return arm


def in_a_checkpoint(step):
    """Kill while a checkpoint is being written: half of it exists, but not its marker."""

    def arm():
        from transformers import Trainer

        save = Trainer._save_rng_state

        def dying(self, folder):
            if folder.endswith(f"checkpoint-{step}"):
                kill()
            save(self, folder)

        Trainer._save_rng_state = dying

    return arm


def in_writing_rows(name, nth):
    """Kill in the middle of a line of a growing file."""

    def arm():

        from holdfast.evaluation import answering, moderation

        append, count = answering.append_jsonl, [0]

        def dying(path, rows):
            count[0] += path.name == name
            if path.name == name and count[0] == nth:
                append(path, rows[:1])
                with path.open("a") as file:
                    file.write(as_line(rows[-1])[:20])
                    file.flush()
                kill()
            append(path, rows)

        answering.append_jsonl = moderation.append_jsonl = dying

    return arm
