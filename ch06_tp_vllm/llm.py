"""vLLM's offline interface.

from ch06_tp_vllm import LLM, SamplingParams
llm = LLM()
for output in llm.generate(["What is a block table?"], SamplingParams(temperature=0, max_tokens=40)):
    print(output.outputs[0].text)
"""

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from ch06_tp_vllm.llm_engine import LLMEngine, Prompt
from ch06_tp_vllm.outputs import RequestOutput
from ch06_tp_vllm.sampling_params import SamplingParams
from common.distributed.messages import share
from common.parallel_state import shutdown_tensor_parallel


class LLM:
    """A model behind one call; the arguments are those of LLMEngine. Under torchrun every rank makes the same calls."""

    def __init__(self, model: str | None = None, *, tensor_parallel_size: int | None = None, **engine_args):
        self.llm_engine = LLMEngine(model, tensor_parallel_size=tensor_parallel_size, **engine_args)
        self._next_id = 0

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *, use_tqdm: bool = True,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer all prompts; the outputs come in their order.

        Raises ValueError, and nothing runs, if one of them is refused, or if the engine's own loop has unfinished requests.
        """
        engine, prompts = self._engine(), _as_list(prompts)
        if engine.has_unfinished_requests():
            raise ValueError(
                f"the engine has {len(engine.groups)} unfinished requests of add_request; step until they end, or abort them"
            )
        params = _one_each(sampling_params, len(prompts))
        ids = [engine.tokenize(prompt) for prompt in prompts]
        for one, p in zip(ids, params, strict=True):
            engine.check_request(one, p)
        names = [str(self._next_id + i) for i in range(len(prompts))]
        self._next_id += len(prompts)
        try:
            outputs = self._run(names, prompts, params, use_tqdm)
        except BaseException:  # Ctrl-C too: leave nothing behind that the next call would trip over
            for name in names:
                if name in engine.groups:
                    engine.abort_request(name)
            raise
        if engine.tp.size > 1:
            outputs = [RequestOutput.from_json(value) for value in share([o.to_json() for o in outputs], engine.tp)]
            engine.groups.clear()
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _run(
        self, names: list[str], prompts: list[Prompt], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        """Queue and step to the end; the outputs on rank 0."""
        engine, outputs = self.llm_engine, []
        for name, prompt, p in zip(names, prompts, params, strict=True):
            engine.add_request(name, prompt, p)
        if engine.tp.rank > 0:
            engine.runner.follow()
            return []
        with tqdm(total=len(prompts), desc="prompts", disable=None if use_tqdm else True, leave=False) as bar:
            while engine.has_unfinished_requests():
                engine.run_step()
                done = engine.take_outputs(only_finished=True)
                outputs += done
                bar.update(len(done))
        engine.runner.stop()
        return outputs

    def _engine(self) -> LLMEngine:
        if self.llm_engine is None:
            raise ValueError("this LLM is shut down; make a new one")
        return self.llm_engine

    def chat(
        self, messages: Sequence[dict[str, str]] | Sequence[Sequence[dict[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool = True,
    ) -> list[RequestOutput]:  # fmt: skip
        """generate, for one conversation or several: lists of {"role": ..., "content": ...}."""
        tokenizer = self._engine().runner.tokenizer
        if tokenizer is None:
            raise ValueError(
                "this checkpoint has no tokenizer, so no chat template; use generate with prompt_token_ids"
            )
        if not isinstance(messages, list | tuple):
            raise ValueError(f"messages={messages!r:.80} must be a list of messages, or of such lists")
        several = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [tokenizer.encode_chat(conversation) for conversation in several]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def shutdown(self) -> None:
        """Let go of the model and leave the process group."""
        if self.llm_engine and self.llm_engine.trace:
            self.llm_engine.trace.close()
        self.llm_engine = None
        shutdown_tensor_parallel()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc) -> None:
        self.shutdown()


def _as_list(prompts) -> list[Prompt]:
    """One prompt (a text, ids, a dict) or several."""
    if isinstance(prompts, str | dict) or not isinstance(prompts, Iterable):
        return [prompts]
    prompts = list(prompts)
    single = prompts and hasattr(prompts[0], "__index__") and getattr(prompts[0], "ndim", 0) == 0  # token ids
    return [prompts] if single else prompts


def _one_each(params, n: int) -> list[SamplingParams]:
    """One for all, or one for each."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if isinstance(params, dict) or not isinstance(params, Iterable):
        raise ValueError(f"sampling_params={params!r} must be a SamplingParams, or one for each prompt")
    params = list(params)
    if len(params) != n:
        raise ValueError(f"{len(params)} sampling_params for {n} prompts; give one for all or one for each")
    return params
