"""Who may run together, what is forgotten, and what unloading waits for: four adapters of the bundled model, two places.

    python ch07_sglang_radix/adapters/demo_3_who_may_run.py

Every part runs the product's own scheduler; what is printed is read from it after each step.
"""

import math

from ch07_sglang_radix import Engine
from ch07_sglang_radix.adapters.gate import PATIENCE, LoRAGate
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading, mistake, table
from common.tiny_qwen import ADAPTERS_PATH

NAMES = ("pirate", "chinese", "terse", "index")
QUESTION = "What is a radix cache?"
PATHS = {name: str(ADAPTERS_PATH / name) for name in NAMES}


def an_engine(names=NAMES, **limits) -> Engine:
    limits = {"max_loras_per_batch": 2} | limits
    return Engine(
        device="cpu", lora_paths={name: PATHS[name] for name in names}, max_total_tokens=4096, check=True, **limits
    )


def main() -> None:
    two_places_for_four()
    nobody_waits_for_ever()
    memory_for_three()
    unloading_waits()
    the_same_name_again()


class Watch:
    """What the scheduler does, step by step; requests are called by adapter and number."""

    def __init__(self, engine: Engine):
        self.engine, self.scheduler, self.called, self.rows = engine, engine.scheduler, {}, []
        self.names = {adapter.identity: name for name, adapter in self.scheduler.lora.names.items()}
        self.scheduler.after_step.append(self.look)

    def ask(self, name: str | None, length: int) -> int:
        ids = self.engine.wrapper.tokenizer.encode(QUESTION)
        rid = self.scheduler.enqueue(None, ids, SamplingParams(max_new_tokens=length, ignore_eos=True), lora_path=name)
        self.called[rid] = f"{name or 'base'}{sum(one.startswith(name or 'base') for one in self.called.values()) + 1}"
        return rid

    def look(self) -> None:
        s = self.scheduler
        drained = [self.names[one] for one in self.adapters.gate.draining]
        running = " ".join(self.called[req.rid] for req in sorted(s.admitted, key=lambda req: req.rid))
        waiting = " ".join(self.called[req.rid] for req in s.waiting)
        row = (running, waiting, " ".join(drained))
        if not self.rows or self.rows[-1][1:] != row:  # a line where something has changed
            self.rows.append((s.step_number, *row))

    @property
    def adapters(self):
        return self.engine._adapters


def two_places_for_four() -> None:
    heading("Two places, four adapters, seven requests at once: who runs after which step")
    with an_engine() as engine:
        watch = Watch(engine)
        for name, length in (
            ("pirate", 6),
            ("chinese", 3),
            ("terse", 5),
            ("pirate", 2),
            (None, 4),
            ("index", 3),
            ("terse", 3),
        ):
            watch.ask(name, length)
        most = []
        engine.scheduler.after_step.append(
            lambda: most.append(len({req.lora_id for req in engine.scheduler.admitted if req.lora_id}))
        )
        engine.scheduler.process_requests()
    table(("step", "runs", "waits", "drains"), watch.rows)
    check("never more than two adapters at once, and the base beside them", max(most) == 2)


def nobody_waits_for_ever() -> None:
    heading("One place; again and again somebody asks for `pirate`, and once somebody for `terse`")

    def first_token_of_terse(patience: float) -> int:
        with an_engine(("pirate", "terse"), max_loras_per_batch=1) as engine:
            watch = Watch(engine)
            gates = engine.scheduler.admission.gates
            ours = watch.adapters.gate
            gates[gates.index(ours)] = watch.adapters.gate = LoRAGate(ours._registry, ours._seat, patience)
            begun: list[int] = []

            def arrivals(step: int) -> bool:
                if step == 3:
                    watch.ask("terse", 4)
                if step % 2 == 0 and step < 60:
                    watch.ask("pirate", 8)
                for req in engine.scheduler.admitted:
                    if watch.called[req.rid] == "terse1" and not begun:
                        begun.append(step)
                return step < 60

            engine.scheduler.process_requests(arrivals)
        return begun[0] - 3

    never, ours = first_token_of_terse(math.inf), first_token_of_terse(PATIENCE)
    mistake("steps that `terse` waits, if whoever's adapter runs may always enter", never, ours)
    check(f"passed over {PATIENCE} times, then for as long as those who run", ours < 30 < never)


def memory_for_three() -> None:
    heading("Slots for two, memory for three: where the adapters are after each question")
    with an_engine(NAMES[:3], max_loaded_loras=3) as engine:
        book, rows = engine.scheduler.lora, []
        names = lambda identities: " ".join(book.by_identity[one].ref.name for one in identities)  # noqa: E731
        for name in ("pirate", "chinese", "terse", "index", "pirate"):
            if name == "index":
                engine.load_lora_adapter("index", PATHS["index"])
            engine.generate(QUESTION, {"max_new_tokens": 1}, lora_path=name)
            slots = " ".join(
                f"{slot}:{book.by_identity[one].ref.name}"
                for one, slot in sorted(book.slots.items(), key=lambda x: x[1])
            )
            rows.append(
                (name, slots, names(book.loaded), names(one for one in book.by_identity if one not in book.loaded))
            )
        table(("asked for", "in a slot", "in memory, the next to go first", "known"), rows)
        check("who was forgotten was read again when it was asked for", book.acquire("pirate") in book.loaded)


def unloading_waits() -> None:
    heading(
        "`pirate` is unloaded at step 3, while two requests use it, and another one is loaded under its name at step 5"
    )
    with an_engine(("pirate",)) as engine:
        watch, said = Watch(engine), []

        def arrivals(step: int) -> bool:
            if step == 0:
                watch.ask("pirate", 6), watch.ask("pirate", 9)
            elif step == 3:
                gone = watch.adapters.unload("pirate")
                gone.add_done_callback(lambda _: said.append((engine.scheduler.step_number, "forgotten by all ranks")))
                said.append((step, "unloaded"))
            elif step == 4:
                said.append((step, f"asked for: {refused(engine)}"))
            elif step == 5:
                engine.load_lora_adapter("pirate", PATHS["terse"])
                watch.names[engine.scheduler.lora.acquire("pirate")] = "pirate"
                watch.ask("pirate", 3)
                said.append((step, "another one loaded as pirate"))
            now = f"in memory: {len(engine.wrapper.lora.loaded)}"
            if now != ([what for _, what in said if what.startswith("in memory")] or [""])[-1]:
                said.append((step, now))
            return step < 14 and engine.scheduler.busy

        engine.scheduler.process_requests(arrivals)
        engine.scheduler.step()
    table(("before step", "what"), said)
    check("what was unloaded stayed until its last user had ended", (10, "forgotten by all ranks") in said)


def refused(engine: Engine) -> str:
    try:
        return engine.scheduler.lora.acquire("pirate")
    except ValueError as error:
        return str(error)


def the_same_name_again() -> None:
    heading("The same question: how much of it is found in the tree")
    with an_engine(("pirate", "terse")) as engine:

        def cached(name: str | None) -> int:
            return engine.generate(QUESTION, {"max_new_tokens": 4}, lora_path=name)["meta_info"]["cached_tokens"]

        rows = [(name or "base", cached(name), cached(name)) for name in (None, "pirate", "terse")]
        engine.unload_lora_adapter("pirate")
        engine.load_lora_adapter("pirate", PATHS["pirate"])
        rows.append(("pirate, loaded again", cached("pirate"), cached("pirate")))
    table(("asked", "the first time", "again"), rows)
    check(
        "nobody finds what another adapter has computed, nor an earlier one of its name",
        all(row[1] == 0 < row[2] for row in rows),
    )


if __name__ == "__main__":
    run_main(main)
