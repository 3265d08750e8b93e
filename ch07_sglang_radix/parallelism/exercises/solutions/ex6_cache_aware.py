"""Solution of exercise 6: The replica that has it."""


def best_match(prompt: str, sent: list[tuple[str, str]]) -> tuple[int, str | None]:
    best, worker = 0, None
    for text, name in sent:
        common = 0
        while common < min(len(text), len(prompt)) and text[common] == prompt[common]:
            common += 1
        if common and common >= best:
            best, worker = common, name
    return best, worker


def choose(prompt: str, sent: list[tuple[str, str]], loads: dict[str, int]) -> str:
    least_loaded = min(loads, key=loads.get)
    most, least = max(loads.values()), min(loads.values())
    if most - least > 64 and most > 1.5 * least:
        return least_loaded
    matched, worker = best_match(prompt, sent)
    return worker if matched > 0.3 * len(prompt) and worker in loads else least_loaded
