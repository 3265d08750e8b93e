"""The prefill side: bootstrap -> waiting -> inflight.

    bootstrap    until the decode side has reserved pages for it: nothing is computed whose K and V would have nowhere to go
    waiting      the scheduler's own queue, and its steps. After each, the pages that are whole by now leave, while the next chunk
                 is computed
    inflight     it has its one token and is over for the scheduler; its pages stay until every receiver has said that it has them

SGLang 0.5.23: PrefillBootstrapQueue and process_disagg_prefill_inflight_queue in srt/disaggregation/prefill.py.
"""

from dataclasses import astuple
from typing import ClassVar

from ch07_sglang_radix.disaggregation import orders
from ch07_sglang_radix.disaggregation.held import Held
from ch07_sglang_radix.disaggregation.rooms import DEFLECTED, State
from ch07_sglang_radix.disaggregation.side import Passage, Side
from ch07_sglang_radix.request import Req
from common.request.end import End


class Prefill(Side):
    stages = polled = ("bootstrap", "waiting", "inflight")
    waits_in: ClassVar[dict[str, str]] = {
        "bootstrap": "no decode engine has reserved pages for this prompt",
        "inflight": "not all ranks of the decode engine have said that they have the pages",
    }  # fmt: skip

    def begin(self, one: Passage) -> None:
        self.memory.heirs[one.req] = lambda req: self._inherit(one, req)

    def before_poll(self) -> None:
        for one in list(self.passages.values()):
            if one.req.ended and one.stage != "inflight":  # aborted, or its step has failed
                reason = one.req.finish_reason.get("message", "the request was aborted on the prefill side")
                self.fail(one, reason)
            elif one.stage == "waiting":
                self._send_what_is_whole(one)
            elif one.stage == "inflight" and not one.told:
                self._send_the_rest(one)

    def move(self, one: Passage, state: State) -> None:
        if one.stage == "bootstrap" and state >= State.WAITING_FOR_INPUT:
            if self.manager.digest(one.room) != self.digest(one.req):
                self.fail(
                    one,
                    f"room {one.room} has different prompts on its two sides, or different files behind its lora_path; send the "
                    "same request to both, and load the same files on both",
                )
                return
            self.scheduler.elsewhere.remove(one.req)
            self.scheduler.waiting.append(one.req)
            one.move("waiting")
        elif one.stage == "inflight" and state is State.SUCCESS:
            self.leave(one)

    def fail(self, one: Passage, why: str) -> None:
        """Who is deflected has not failed: it ends without a token, which nobody waits for."""
        if why == DEFLECTED and not one.req.ended:
            self.scheduler.outcome.stop(one.req, End("length"))
            self.leave(one)
        else:
            super().fail(one, why)

    def _send_what_is_whole(self, one: Passage) -> None:
        """Of a prompt that is being computed: the pages that no later chunk writes to."""
        req = one.req
        if req.row < 0:
            if one.sent:  # its pages were taken back under way (POST /pause_generation, mode retract)
                self.fail(one, "the request was retracted while its pages were on their way")
            return
        first, whole = self.manager.first_missing(one.room), req.kv_len // self.memory.page_size
        begin = first + one.sent
        if whole > begin:
            row = self.memory.rows.req_to_token[req.row]
            pages = row[:: self.memory.page_size][begin:whole] // self.memory.page_size
            self._send(one, False, pages.tolist())

    def _inherit(self, one: Passage, req: Req) -> None:
        """RequestMemory.heirs: the request has ended, and its row goes. What it held is the room's from now on."""
        slots = self.memory.rows.req_to_token[req.row, : req.allocated_len].copy()
        pages = self.memory.whole_pages(len(req.prompt_ids))
        self.memory.pool.free(slots[pages:])
        self.held.of[one.room] = Held(slots[:pages], req.prefix_len, req.last_node)
        if not req.output_ids or req.finish_reason["type"] == "abort":
            return  # `before_poll` sees that it has ended
        one.move("inflight")

    def _send_the_rest(self, one: Passage) -> None:
        req, one.told = one.req, True
        first = self.manager.first_missing(one.room)
        self._send(one, True, self.held.pages(one.room)[first + one.sent :])
        self._tell_all([])  # now: the metadata comes behind the last pages
        told = [[astuple(token) for token in tokens] for tokens in (req.answer.logprobs, req.prompt_logprobs)]
        self.manager.metadata(one.room, req.output_ids[0], req.cached_tokens or 0, req.seed, *told)

    def _send(self, one: Passage, last: bool, pages: list[int]) -> None:
        one.sent += len(pages)
        self.order(orders.SEND, one.room, int(last), *pages)
