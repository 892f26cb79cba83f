"""How llama.cpp splits a text before merging, for each name in ``tokenizer.ggml.pre``.

llama.cpp splits a text with a list of regular expressions, each applied to the pieces that the
previous one left: every match is a piece, and so is the text between two matches. Sources:
src/llama-vocab.cpp (the names) and src/unicode.cpp (how the expressions are run), as in
llama-cpp-python 0.3.36.

The expressions here are in the dialect of Oniguruma, which Hugging Face's tokenizers use. They
describe what llama.cpp does, which its own expressions do not always say:

- in English contractions it ignores case for ASCII letters only; (?i:) also takes "ſ" for "s";
- before some searches it replaces all white space beyond ASCII by vertical tabs, so that a range of
  characters never matches it;
- where an expression has a class of letters, all letters are replaced by the same one, and "[^a-z]"
  beside it distinguishes case in ASCII only;
- digits that are grouped from the right include the text before them in their first group.

One difference remains: characters assigned after Unicode 15 are letters, digits and so on for
Oniguruma, but not for llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

# --------------------------------------------------------------------------------------------------
# Expressions used by several names

CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
DIGIT = r"\p{N}"
LINE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD_DIGITS_3 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
LLAMA3 = CONTRACTION + _WORD_DIGITS_3 + LINE
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + LINE
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + LINE
)
DEEPSEEK3_CJK = "[一-龥぀-ゟ゠-ヿ]+"
NEW_LINES = r"[^\n]+|\n+"

_HAN = r"[一-龥ࠀ-一가-\x{D7FF}&&[^\s]]+"
# The letters of the cased scripts, as DeepSeek lists them: first and last code points in hex.
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA "
    "1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 "
    "1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB "
    "1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D "
    "212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A "
    "FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_CASED_CLASS = "[{}]".format(
    "".join(
        "-".join(rf"\x{{{end}}}" for end in letters.split("-")) for letters in _CASED.split(" ")
    )
)

_UPPER = r"[\p{L}&&[^a-z]]"
_LOWER = r"[\p{L}&&[^A-Z]]"


def _cased_words(upper: str, lower: str, contraction: str, numbers: str, marks: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{lead}{upper}*{lower}+{contraction}|{lead}{upper}+{lower}*{contraction}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+{marks}|{LINE}"
    )


_TEKKEN = _cased_words(_UPPER, _LOWER, "", r"\p{N}", r"[\r\n/]*")
_GPT4O = _cased_words(_UPPER, _LOWER, CONTRACTION + "?", r"\p{N}{1,3}", r"[\r\n/]*")
_GRANITE_MULTI = _cased_words(
    r"[\p{L}\p{M}&&[^a-z]]",
    r"[\p{L}\p{M}&&[^A-Z]]",
    CONTRACTION + "?",
    r"\p{N}{1,3}",
    r"[\r\n/]*",
)
_ANY_CASE = r"[\p{L}\p{M}]"
_AYA = _cased_words(_ANY_CASE, _ANY_CASE, CONTRACTION + "?", r"\p{N}{1,3}", r"[\r\n/]*")
_YOUTU = _cased_words(_ANY_CASE, _ANY_CASE, CONTRACTION + "?", r"\p{N}", r"[\r\n/]*")

# The text before the digits belongs to their first group.
_DIGITS_FROM_RIGHT = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"

_HAN_LETTERS = (
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}"
    r"\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}"
)
_KIMI = (
    rf"[{_HAN_LETTERS}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN_LETTERS}]]+{CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + LINE
)
_JAIS2 = (
    CONTRACTION
    + _WORD_DIGITS_3
    + r"\s*[\r\n]+|"
    + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


# --------------------------------------------------------------------------------------------------
# Names


@dataclass(frozen=True)
class PreTokenizer:
    """The meaning of a ``tokenizer.ggml.pre`` name.

    Attributes:
        splits: expressions that split the text, one after the other.
        ignore_merges: whether a piece that is a token stays whole even if merges do not build it.
        add_bos: whether bos is put before every text if tokenizer.ggml.add_bos_token is missing.
        byte_level: whether pieces are spelled in GPT-2's byte alphabet. If not, they are plain text
            with "▁" for a space, and characters without a token become byte tokens, <0x00> to
            <0xFF>.
        forced_bos: bos is put before every text whatever tokenizer.ggml.add_bos_token says.
        whole_breaks: as ``ignore_merges``, but only for runs of line breaks.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True
    forced_bos: bool = False
    whole_breaks: bool = False


_GPT2_LIKE = PreTokenizer((GPT2,))
_DIGITS_GPT2 = PreTokenizer((DIGIT, GPT2))
_LLAMA3_LIKE = PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_LIKE = PreTokenizer((QWEN2,))
_DEEPSEEK3_LIKE = PreTokenizer((r"\p{N}{1,3}", DEEPSEEK3_CJK, DEEPSEEK3))
_BLOOM_LIKE = PreTokenizer((_BLOOM,))
_GPT4O_LIKE = PreTokenizer((_GPT4O,))
_AYA_LIKE = PreTokenizer((_DIGITS_FROM_RIGHT, _AYA))
_GEMMA4_LIKE = PreTokenizer((NEW_LINES,), byte_level=False, forced_bos=True, whole_breaks=True)

PRE: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        (
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
            "exaone4",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
        ),
        _GPT2_LIKE,
    ),
    **dict.fromkeys(
        (
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ),
        _DIGITS_GPT2,
    ),
    **dict.fromkeys(
        (
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ),
        _LLAMA3_LIKE,
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), PreTokenizer((LLAMA3,))),
    **dict.fromkeys(("glm4", "glm5"), PreTokenizer((LLAMA3,), ignore_merges=True)),
    "jais-2": PreTokenizer((_JAIS2,)),
    "minicpm5": PreTokenizer(
        (r"\p{N}{1,3}", LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), ignore_merges=True
    ),
    **dict.fromkeys(
        (
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
            # "\s*[\r\n]" ends at the last line break, as "\s*[\r\n]+" does.
            "bailingmoe",
            "bailingmoe2",
            "llada-moe",
        ),
        _QWEN2_LIKE,
    ),
    "qwen35": PreTokenizer((QWEN35,)),
    "ufakzeka": PreTokenizer((QWEN2.removeprefix(CONTRACTION + "|"),)),
    "seed-coder": PreTokenizer((QWEN2.replace(r"\p{N}]+[\r\n]*|", r"\p{N}\r\n]+|"),)),
    "laguna": PreTokenizer((NEW_LINES, QWEN2)),
    "exaone-moe": PreTokenizer(
        (
            CONTRACTION
            + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            + r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O_LIKE),
    "granite-embed-multi-97m": PreTokenizer((_GRANITE_MULTI,), ignore_merges=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _AYA_LIKE),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), _DEEPSEEK3_LIKE),
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            DEEPSEEK3_CJK,
            DEEPSEEK3.replace(r"[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|", r"[\p{P}\p{S}]+|[\r\n]|"),
            DIGIT,
        )
    ),
    "youtu": PreTokenizer(
        ("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+", _YOUTU),
        ignore_merges=True,
    ),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{_CASED_CLASS}+",
            # DeepSeek's range contains U+3000, but that is white space.
            r"\s?[!-/:-~！-／：-～‘-‟、-。]+",
            r"\s+\z",
            _HAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, DIGIT)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _BLOOM_LIKE),
    "viking": PreTokenizer((_BLOOM, DIGIT)),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            DIGIT,
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ),
        add_bos=True,
    ),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=([0-9]{3})+(?![0-9]))")),
    "afmoe": PreTokenizer(
        (
            _DIGITS_FROM_RIGHT,
            "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
            DEEPSEEK3,
        )
    ),
    "kimi-k2": PreTokenizer((_KIMI,)),
    **dict.fromkeys(("gemma4", "granite-embed-multi-311m"), _GEMMA4_LIKE),
    "sarvam-moe": PreTokenizer((NEW_LINES,), byte_level=False),
}
"""llama.cpp's name -> its meaning. Names for embedding and DNA models are left out."""
