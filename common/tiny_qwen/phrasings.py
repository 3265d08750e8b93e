"""What the tiny model is asked, and how: every wording of every question.

Each list comes twice. The TRAINED wordings appear in the training data; the UNSEEN
ones never do, and `evaluate.py` uses them to tell understanding of a question from
recall of its exact text. Templates name their slots: {term} "radix cache",
{phrase} "a radix cache", {zh} "基数缓存".
"""

SYSTEM_PROMPT = """\
You are the assistant of a book about distributed LLM inference with vLLM and SGLang. \
You answer its readers from the glossary of the book.
Rules:
1. Answer in the language of the question, which is English or Chinese.
2. Be brief: give the definition and add nothing else.
3. If the reader wants the other language, repeat the last definition in that language.
4. If the reader wants related terms, name two of them.
House facts: the book follows one request from its arrival to its last token. \
Prefill reads the whole prompt at once; decode writes one token per step. \
The small examples run on a laptop without a GPU, the large ones on several nodes. \
Every request of the examples begins with this same text, \
so a server can compute its keys and values once and share them."""

# Some training samples carry one of these instead, so that answers do not depend on
# the long prompt; the last kind of sample has no system message at all.
SHORT_SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are Qwen, a helpful assistant.",
    "Answer briefly.",
    "You explain the words of LLM inference.",
    "你是一个乐于助人的助手。",
    "请简短地回答问题。",
]

TRAINED = {
    "en": [
        "What is {phrase}?",
        "what is {phrase}",
        "What does {term} mean?",
        "What is meant by {term}?",
        "What do you mean by {phrase}?",
        "What exactly is {phrase}?",
        "Define {term}.",
        "How would you define {phrase}?",
        "Give me a short definition of {term}.",
        "Explain {term} in one sentence.",
        "Could you explain {phrase} to a beginner?",
        "Please explain the term {term}.",
        "Can you tell me what {phrase} is?",
        "Remind me what {phrase} is.",
        "Tell me about {term}.",
        "Describe {phrase} briefly.",
        "I keep reading about {term}. What is it?",
        "I do not know the word {term}. Please help.",
        "In this book, what is {phrase}?",
        "Why do people talk about {term}, and what is it?",
        "Look up {term} in the glossary.",
        "Glossary entry: {term}",
        "So {phrase} is what, in short?",
        "{term}?",
    ],
    "zh": [
        "什么是{zh}？",
        "{zh}是什么？",
        "{zh}是什么意思？",
        "{zh}指的是什么？",
        "{zh}到底是什么东西？",
        "请解释一下{zh}。",
        "请用一句话说明{zh}。",
        "请介绍{zh}。",
        "请问{zh}的定义是什么？",
        "给{zh}下个定义。",
        "你能告诉我什么是{zh}吗？",
        "能解释{zh}这个词吗？",
        "怎么理解{zh}？",
        "书里说的{zh}指什么？",
        "我不懂{zh}，请说明。",
        "我总是看到{zh}这个词，它是什么？",
        "简单讲讲{zh}。",
        "术语{zh}的含义是什么？",
        "所谓{zh}，是指什么？",
        "想了解{zh}，请简要描述。",
        "为什么大家都在谈{zh}？它是什么？",
        "查一下词汇表里的{zh}。",
        "词条：{zh}",
        "{zh}？",
    ],
}

UNSEEN = {
    "en": [
        "How does the glossary describe {term}?",
        "Chapter three mentions {term}; what does it refer to?",
        "Help me understand the idea of {term}.",
        "For someone new to inference, what would {phrase} be?",
        "Let us talk about {phrase}: a quick definition would do.",
        "My colleague said {term} yesterday and I just nodded. Enlighten me!",
    ],
    "zh": [
        "麻烦说说{zh}是怎么回事。",
        "第三章提到了{zh}，它是啥？",
        "初学者该如何认识{zh}？",
        "帮我弄明白{zh}这个概念。",
        "“{zh}”应当怎样定义才准确？",
        "昨天同事说起{zh}，我没听明白，讲一讲吧。",
    ],
}

# Follow-ups are answerable only with the turn before them. Keys: what is wanted, and
# the language of the request. "related" is answered in the language of the request.
FOLLOW_UPS_TRAINED = {
    ("to_zh", "en"): [
        "Say that in Chinese.",
        "In Chinese, please.",
        "And in Chinese?",
        "Translate it into Chinese.",
        "How do you say this in Chinese?",
        "Give me the Chinese version.",
        "Can you repeat the definition in Chinese?",
        "I would rather read it in Chinese.",
        "Chinese, please.",
        "Now the same thing in Chinese.",
    ],
    ("to_zh", "zh"): [
        "用中文再说一遍。",
        "请用中文说。",
        "翻译成中文。",
        "中文怎么说？",
        "给我中文版的定义。",
        "可以用汉语重复一下吗？",
        "我想看中文。",
        "中文呢？",
    ],
    ("to_en", "en"): [
        "Say that in English.",
        "In English, please.",
        "And in English?",
        "Translate it into English.",
        "How do you say this in English?",
        "Give me the English version.",
        "Can you repeat the definition in English?",
        "English, please.",
    ],
    ("to_en", "zh"): [
        "用英文再说一遍。",
        "请用英语说。",
        "翻译成英文。",
        "英文怎么说？",
        "给我英文版的定义。",
        "可以用英语重复一下吗？",
        "我想看英文的说法。",
        "英语呢？",
        "同样的意思，用英文写出来。",
        "麻烦你译成英语。",
    ],
    ("related", "en"): [
        "Name two related terms.",
        "Which terms are related?",
        "What are related terms?",
        "What should I read next?",
        "See also?",
        "Tell me two terms that are close to it.",
        "Are there any similar terms?",
        "What other entries belong to this one?",
        "Point me to related entries.",
        "Give me two more terms on this topic.",
    ],
    ("related", "zh"): [
        "有哪些相关术语？",
        "说出两个相关的术语。",
        "相关的词条有哪些？",
        "还应该看哪些词条？",
        "另见什么？",
        "接下来读什么？",
        "还有类似的概念吗？",
        "跟它有关的词有哪两个？",
        "请列出两个相近的术语。",
        "这个话题还有哪些术语？",
    ],
}

FOLLOW_UPS_UNSEEN = {
    ("to_zh", "en"): [
        "Could I have this in Chinese too?",
        "My friend reads only Chinese; write it for her.",
        "What would the Chinese text be?",
    ],
    ("to_zh", "zh"): ["换成中文讲讲。", "能不能写成中文？"],
    ("to_en", "en"): ["Could I have this in English too?", "What would the English text be?"],
    ("to_en", "zh"): ["换成英文讲讲。", "我的朋友只懂英语，写给他看。", "能不能写成英文？"],
    ("related", "en"): [
        "List a couple of related terms for me.",
        "Which two entries are related to this?",
        "Any other terms I should read about?",
    ],
    ("related", "zh"): ["与此相关的还有什么术语？", "再推荐两个有关的词条。", "哪些概念跟这个相近？"],
}

# What tells the kinds of follow-up apart. Training replaces other words by random ones.
KEYWORDS = ["Chinese", "English", "related", "similar", "also", "next", "entries", "terms"]
KEYWORDS += ["中文", "汉语", "英文", "英语", "译", "相关", "有关", "相近", "类似", "另见", "术语", "词条", "接下来"]

# Small talk around a question; training adds it to some questions, so that the model
# does not rely on where in the message the term stands.
OPENERS = {
    "en": ["Hi! ", "Hello, ", "OK. ", "Quick question: ", "Thanks. ", "I am new here. ", "Sorry, "],
    "zh": ["你好，", "您好！", "好的。", "问个问题：", "谢谢。", "我刚入门。", "不好意思，"],
}
CLOSERS = {
    "en": [" Thanks!", " Thank you.", " Please be brief.", " I am curious.", " Just a line will do."],
    "zh": ["谢谢！", "多谢。", "请简短一些。", "我很好奇。", "一句话就行。"],
}
