"""Words and sentences of the simulated arena.

A sentence is a template and the kinds of its slots in order: ``q`` a quality word (good or bad),
``n`` a noun of the topic, ``w`` a context of a question. Quality words carry all that a reader has
to see; nouns say whether the answer is about the question.
"""

from typing import NamedTuple


class Language(NamedTuple):
    """What one language needs for prompts and responses."""

    good: tuple[str, ...]
    bad: tuple[str, ...]
    topics: tuple[tuple[str, ...], ...]
    questions: tuple[tuple[str, str], ...]
    details: tuple[tuple[str, str], ...]
    openings: tuple[tuple[str, str], ...]
    bodies: tuple[tuple[str, str], ...]
    contexts: tuple[str, ...]
    short: str
    long: str
    polite: str
    informal: str
    apology: str
    space: str


# Every opening has exactly this many quality slots: how many are good is the answer's quality.
OPENING_SLOTS = 6


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ENGLISH = Language(
    good=_words(
        "great excellent perfect helpful clear correct accurate useful wonderful reliable wise good"
    ),
    bad=_words(
        "terrible awful horrible useless wrong bad stupid broken confusing poor false misleading"
    ),
    topics=(
        _words("river boat bridge lake fish water harbor wave bank island"),
        _words("garden flower seed tree soil leaf root plant rose grass"),
        _words("code function program computer variable loop server test library data"),
        _words("cake bread recipe oven kitchen sugar butter soup cheese dinner"),
        _words("music song guitar piano band drum melody concert singer rhythm"),
        _words("star planet moon sun space rocket orbit telescope galaxy comet"),
        _words("doctor patient hospital medicine disease heart blood brain nurse diet"),
        _words("football team coach game player goal ball match league stadium"),
        _words("bank money loan tax market stock price budget investor salary"),
        _words("history king war empire castle army queen treaty revolution soldier"),
        _words("train ticket hotel flight city museum map station airport beach"),
        _words("book story novel poem author chapter hero character plot reader"),
        _words("dog cat horse puppy bird animal tail paw pet kitten"),
        _words("school teacher student exam lesson class homework university grade essay"),
        _words("law court judge contract lawyer police crime witness rule trial"),
        _words("number equation triangle proof angle fraction theorem integer sum graph"),
    ),
    questions=(
        ("How does the %s work with the %s %s?", "nnw"),
        ("What is the best way to choose a %s for the %s %s?", "nnw"),
        ("Explain the %s %s, and say why the %s matters.", "nwn"),
        ("Write a few lines %s about a %s and a %s.", "wnn"),
        ("Why do people care so much about the %s and not about the %s %s?", "nnw"),
        ("Can you compare one %s with another %s %s?", "nnw"),
    ),
    details=(
        ("Please think about the %s as well, since my friend asked me about it.", "n"),
        ("I read something on the %s and the %s last week.", "nn"),
        ("Keep it under one page and mention the %s.", "n"),
        ("My own view is that the %s comes before the %s.", "nn"),
    ),
    openings=(
        ("The answer is %s and %s, the %s part is %s and %s, the rest is %s and %s.", "qqnqqqq"),
        ("This reply on the %s is %s, %s and %s, its points are %s, %s and %s.", "nqqqqqq"),
        ("About the %s: %s facts, %s steps, %s advice, and %s, %s, %s examples.", "nqqqqqq"),
        ("For the %s I give %s and %s reasons, %s and %s details, %s and %s words.", "nqqqqqq"),
    ),
    bodies=(
        ("The %s is explained in a way that is %s and %s.", "nqq"),
        ("Every %s needs a %s, and this part of the text is %s.", "nnq"),
        ("What it says of the %s sounds %s, and the %s example is %s.", "nqnq"),
        ("Then there is the %s, with %s notes and %s hints.", "nqq"),
        ("People who know a %s well would call this %s.", "nq"),
        ("Take the %s first and the %s after it, which makes the plan %s and %s.", "nnqq"),
        ("Between the %s and the %s the argument becomes %s.", "nnq"),
    ),
    contexts=(
        "for a beginner",
        "for an expert",
        "for my sister",
        "for my son",
        "for a child of five",
        "for a friend",
        "for my old father",
        "for a neighbour",
        "in winter",
        "in summer",
        "at night",
        "on a Monday",
        "in Japan",
        "in Brazil",
        "in Kenya",
        "in Norway",
        "in a small town",
        "on a tight schedule",
        "without any tools",
        "at home",
        "at work",
        "in the year 1900",
        "in ten years",
        "step by step",
        "as a letter",
        "as a joke",
        "today",
        "these days",
    ),
    short="In short: ",
    long="In detail: ",
    polite="Thank you for asking. ",
    informal="Hey, lol, ok. ",
    apology="Sorry, I am not sure. ",
    space=" ",
)

SPANISH = Language(
    good=_words("claro correcto bueno exacto excelente perfecto completo honesto fiable sabio"),
    bad=_words("malo falso confuso vago horrible roto pobre aburrido feo incorrecto"),
    topics=(
        _words("río barco puente lago pez puerto"),
        _words("jardín árbol suelo campo trigo rosal"),
        _words("gato perro caballo pájaro león ratón"),
    ),
    questions=(
        ("¿Cómo funciona el %s con el %s?", "nn"),
        ("Explícame qué es un %s y por qué importa el %s.", "nn"),
    ),
    details=(("Piensa también en el %s, por favor.", "n"),),
    openings=(
        ("Sobre el %s: un texto %s, %s y %s, con un final %s, %s y %s.", "nqqqqqq"),
        ("El punto del %s es %s y %s, el tono %s y %s, el resto %s y %s.", "nqqqqqq"),
    ),
    bodies=(
        ("El %s se explica de un modo %s y muy %s.", "nqq"),
        ("Después viene el %s, y aquí el texto es %s.", "nq"),
    ),
    contexts=(),
    short="En breve: ",
    long="En detalle: ",
    polite="Gracias por preguntar. ",
    informal="Bueno, jaja. ",
    apology="Lo siento, no estoy seguro. ",
    space=" ",
)

CHINESE = Language(
    good=_words("清楚 正确 有用 准确 优秀 可靠 完整 很好"),
    bad=_words("错误 模糊 无用 混乱 糟糕 虚假 空洞 很差"),
    topics=(
        _words("河流 小船 大桥 湖水 海岛 港口"),
        _words("花园 树木 泥土 叶子 种子 青草"),
        _words("音乐 钢琴 歌曲 乐队 旋律 歌手"),
    ),
    questions=(
        ("%s和%s有什么关系？", "nn"),
        ("请介绍一下%s，并说明%s为什么重要。", "nn"),
    ),
    details=(("另外也请谈谈%s。", "n"),),
    openings=(
        ("关于%s的回答%s、%s、%s，例子%s、%s、%s。", "nqqqqqq"),
        ("这里对%s的说明%s又%s，理由%s又%s，结论%s又%s。", "nqqqqqq"),
    ),
    bodies=(
        ("接着说%s，这一段%s而且%s。", "nqq"),
        ("%s和%s放在一起看，内容%s。", "nnq"),
    ),
    contexts=(),
    short="简单说：",
    long="详细说：",
    polite="谢谢您的提问。",
    informal="哈哈，好的。",
    apology="抱歉，我不太确定。",
    space="",
)

EMOJI = ("😀", "👍", "🎉", "🚀", "🤖", "❤️", "👩‍🔬", "🇫🇷")
SPECIAL_TOKENS = ("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "</s>", "<|eot_id|>", "[PAD]")
MODELS = (
    "amber-7b", "birch-chat", "cedar-13b", "delta-instruct", "ember-70b", "fjord-2", "grove-mini",
    "heron-8b", "iris-large", "juno-chat", "kelp-3b", "larch-34b",
)  # fmt: skip
