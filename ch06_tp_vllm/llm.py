"""vLLM's offline interface.

from ch06_tp_vllm import LLM, SamplingParams
llm = LLM()
for output in llm.generate(["What is a block table?"], SamplingParams(temperature=0, max_tokens=40)):
    print(output.outputs[0].text)
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ch06_tp_vllm.engine_args import EngineArgs
from ch06_tp_vllm.input_processor import Prompt
from ch06_tp_vllm.llm_engine import LLMEngine
from ch06_tp_vllm.lora_request import LoRARequest, lora_requests
from ch06_tp_vllm.metrics import Metric, engine_metrics
from ch06_tp_vllm.outputs import RequestOutput
from ch06_tp_vllm.sampling_params import SamplingParams
from common import values
from common.arguments import says_names
from common.distributed.messages import share
from common.models.generation_config import sampling_defaults
from common.parallel_state import shutdown_tensor_parallel
from common.request.intake import NO_TOKENIZER
from common.values import flag, one_each, shown

Loras = LoRARequest | Sequence[LoRARequest | None] | None
Params = SamplingParams | Sequence[SamplingParams] | None
# arguments of vLLM's generate and chat that are not here; None asks for nothing of them
ELSEWHERE = {
    "tokenization_kwargs": "texts are encoded as they stand; give token ids",
    "mm_processor_kwargs": "this engine reads text only",
    "chat_template_content_format": "a message's content is a text; leave it out",
    "prompt_token_ids": 'a prompt is {"prompt_token_ids": ids}, or the ids themselves',
}
IDLE = dict.fromkeys(ELSEWHERE) | {"chat_template_content_format": "auto"}
asked = says_names("argument", ELSEWHERE, IDLE)


class LLM:
    """A model behind one call; the arguments are those of EngineArgs. Under torchrun every rank makes the same calls."""

    def __init__(self, model: str | None = None, *, tensor_parallel_size: int | None = None, **engine_args):
        self._engine = LLMEngine(model, tensor_parallel_size=tensor_parallel_size, **engine_args)
        self._next_id = 0

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> "LLM":
        return cls(**vars(args))

    @property
    def llm_engine(self) -> LLMEngine:
        """Raises ValueError once the LLM is shut down."""
        if self._engine is None:
            raise ValueError("this LLM is shut down; make a new one")
        return self._engine

    def get_default_sampling_params(self) -> SamplingParams:
        """What generate uses if it is given none: vLLM's defaults, and over them the model's generation_config.json."""
        engine = self.llm_engine
        if engine.args.generation_config == "vllm":
            return SamplingParams()
        found = sampling_defaults(engine.runner.folder)
        if "max_new_tokens" in found:
            found["max_tokens"] = found.pop("max_new_tokens")
        return SamplingParams(**found)

    @asked
    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, use_tqdm: bool = True,
        priority: Sequence[int] | None = None, lora_request: Loras = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer all prompts; the outputs come in their order. priority: one for each, lower goes first. lora_request: an adapter
        for all, or one for each (lora_request.py).

        Raises ValueError, and nothing runs, if one of them is refused, or if the engine's own loop has unfinished requests.
        """
        engine, prompts, use_tqdm = self.llm_engine, _as_list(prompts), flag("use_tqdm", use_tqdm)
        if engine.has_unfinished_requests():
            raise ValueError(
                f"the engine has {len(engine.groups)} unfinished requests of add_request; step until they end, or abort them"
            )
        params = one_each("sampling_params", sampling_params, len(prompts), SamplingParams, None)
        if None in params:
            default = self.get_default_sampling_params()
            params = [default if one is None else one for one in params]
        priorities = one_each("priority", priority, len(prompts), int, 0)
        for prompt, one, urgency in zip(prompts, params, priorities, strict=True):
            engine.inputs.intake.priority(urgency)
            engine.inputs.check(engine.inputs.read(prompt)[1], one)
        adapters = lora_requests(lora_request, len(prompts))
        for adapter in adapters:
            engine.adapter(adapter)
        names = [str(self._next_id + i) for i in range(len(prompts))]
        self._next_id += len(prompts)
        try:
            outputs = self._run(names, prompts, params, priorities, adapters, use_tqdm)
        except BaseException:  # Ctrl-C too: leave nothing behind that the next call would trip over
            engine.abort_request(names)
            raise
        if engine.tp.size > 1:
            outputs = [RequestOutput.from_json(value) for value in share([o.to_json() for o in outputs], engine.tp)]
            engine.groups.clear()
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _run(
        self, names: list[str], prompts: list[Prompt], params: list[SamplingParams], priorities: list[int],
        adapters: list[LoRARequest | None], use_tqdm: bool,
    ) -> list[RequestOutput]:  # fmt: skip
        """Queue and step to the end; the outputs on rank 0."""
        engine, outputs = self.llm_engine, []
        for name, prompt, one, priority, adapter in zip(names, prompts, params, priorities, adapters, strict=True):
            engine.add_request(name, prompt, one, priority=priority, lora_request=adapter)
        if engine.tp.rank > 0:
            engine.runner.follow()
            return []
        with tqdm(total=len(prompts), desc="prompts", disable=None if use_tqdm else True, leave=False) as bar:
            while engine.has_unfinished_requests():
                engine.run_step()
                done = engine.outputs.take_outputs(only_finished=True)
                outputs += done
                bar.update(len(done))
        engine.runner.stop()
        return outputs

    @asked
    def chat(
        self, messages: Sequence[dict[str, str]] | Sequence[Sequence[dict[str, str]]], sampling_params: Params = None,
        use_tqdm: bool = True, *, priority: Sequence[int] | None = None, chat_template: str | None = None,
        add_generation_prompt: bool = True, continue_final_message: bool = False, tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None, lora_request: Loras = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """generate, for one conversation or several: lists of {"role": ..., "content": ...}.

        chat_template: another one than the checkpoint's, as text, or the name of one of its several. tools: what the template
        is told of them; calls in the answer are text. chat_template_kwargs: what it knows besides (`enable_thinking`).
        """
        tokenizer = self.llm_engine.runner.tokenizer
        if tokenizer is None:
            raise ValueError(f"{NO_TOKENIZER}, so no chat template; use generate with prompt_token_ids")
        if not isinstance(messages, list | tuple):
            raise ValueError(f"messages={shown(messages)} must be a list of messages, or of such lists")
        several = [messages] if messages and isinstance(messages[0], dict) else messages
        more = {
            "chat_template": chat_template, "tools": tools, "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        } | (chat_template_kwargs or {})  # fmt: skip
        prompts = [tokenizer.encode_chat(conversation, **more) for conversation in several]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority, lora_request=lora_request)

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer, of transformers; None if it has none."""
        tokenizer = self.llm_engine.runner.tokenizer
        return tokenizer and tokenizer.hf

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks. False, and nothing is done, while requests hold some."""
        return self.llm_engine.reset_prefix_cache()

    def get_metrics(self) -> list[Metric]:
        """What the engine has counted, under vLLM's names (rank 0's counts; of the others those they keep)."""
        return engine_metrics(self.llm_engine)

    def shutdown(self) -> None:
        """Let go of the model and leave the process group. Safe to call twice."""
        self.__exit__(None, None, None)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """`shutdown`; with an error the other ranks hear of it (common/distributed/goodbyes.py)."""
        if self._engine and self._engine.trace:
            self._engine.trace.close()
        tp = self._engine.tp if self._engine else None
        self._engine = None
        if tp:
            shutdown_tensor_parallel(tp, error)


def _as_list(prompts: Any) -> list[Prompt]:
    """One prompt (a text, ids, a dict) or several."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]
    several, single = values.prompts("prompts", prompts, "one prompt or several")
    return [] if single and len(several[0]) == 0 else several
