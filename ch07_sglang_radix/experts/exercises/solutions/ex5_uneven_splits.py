"""Solution of exercise 5: Counts first."""


def order(choices: list[list[int]], owner: list[int]) -> list[tuple[int, int]]:
    all_of_them = [(token, place) for token, experts in enumerate(choices) for place in range(len(experts))]

    def key(choice: tuple[int, int]) -> tuple[int, int, int]:
        token, place = choice
        expert = choices[token][place]
        return owner[expert], expert, token

    return sorted(all_of_them, key=key)


def send_counts(choices: list[list[int]], owner: list[int], ranks: int) -> list[int]:
    to = [owner[expert] for experts in choices for expert in experts]
    return [to.count(rank) for rank in range(ranks)]


def receive_counts(counts: list[list[int]], rank: int) -> list[int]:
    return [sent[rank] for sent in counts]


def home(order: list[tuple[int, int]], outputs: list, tokens: int, k: int) -> list[list]:
    answers: list[list] = [[None] * k for _ in range(tokens)]
    for (token, place), output in zip(order, outputs, strict=True):
        answers[token][place] = output
    return answers
