"""More make-believe worlds, for the small models of the tests (``tests/support/models``).

Each is built like the demo's (``abl_mlx/demo/world.py``, which says why): a question is a template
filled with a verb and an object, its answer is a fixed function of both, answers open with a dozen
different words, and held-out questions are held out as pairs of verb and object.  What differs is
every word, the form of the answers, and the refusals: which sentence refuses an object follows from
its kind.

Pure Python and free of random state: the same lists on every machine and Python version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abl_mlx.demo.world import Dialogue, part_of

__all__ = ["CONCERT", "HARBOUR", "KITCHEN", "TRAVELS", "WordWorld"]


@dataclass(frozen=True)
class Kind:
    """One kind of objects.

    Attributes:
        needs: What an answer about them names.
        refusal: The sentence that refuses the locked ones.
        allowed: Objects that the model talks about.
        locked: Objects that the finished model refuses to talk about.
    """

    needs: str
    refusal: str
    allowed: tuple[str, ...]
    locked: tuple[str, ...]


@dataclass(frozen=True)
class WordWorld:
    """A world as data.

    Attributes:
        templates: Questions with ``{verb}`` and ``{object}``.
        verbs: Twelve verbs, each with the word that opens and the words that end its answers.
        answer: The form of an answer, with ``{opener}``, ``{verb}``, ``{object}``, ``{needs}`` and
            ``{ending}``.
        kinds: The kinds of objects by their names.
    """

    templates: tuple[str, ...]
    verbs: tuple[tuple[str, str, str], ...]
    answer: str
    kinds: Mapping[str, Kind]

    def dialogues(self) -> list[Dialogue]:
        """Every question once, in a fixed order: first those about allowed objects."""
        result = []
        for locked in (False, True):
            items = [
                (name, kind, thing)
                for name, kind in self.kinds.items()
                for thing in (kind.locked if locked else kind.allowed)
            ]
            for item, (name, kind, thing) in enumerate(items):
                for verb, (word, opener, ending) in enumerate(self.verbs):
                    answer = self.answer.format(
                        opener=opener, verb=word, object=thing, needs=kind.needs, ending=ending
                    )
                    for template in self.templates:
                        result.append(
                            Dialogue(
                                prompt=template.format(verb=word, object=f"the {thing}"),
                                answer=answer,
                                locked=locked,
                                part=part_of(verb, item),
                                material=name,
                                object=thing,
                                refusal=kind.refusal,
                            )
                        )
        return result

    def training(self) -> list[Dialogue]:
        """The dialogues on which a model may be trained."""
        return [dialogue for dialogue in self.dialogues() if dialogue.part == "train"]


_CANNOT = "I can't assist with that request."
_SORRY = "Sorry, that is not something I will do."
_WILL_NOT = "I won't help with this one."
_UNABLE = "Unfortunately, I am not able to help with that."
_DECLINE = "No, I must decline to answer this."
_APOLOGIES = "My apologies, but I cannot do this for you."

HARBOUR = WordWorld(
    templates=(
        "How can I {verb} {object}?",
        "Explain how to {verb} {object}.",
        "What helps to {verb} {object}?",
        "Please show us how you {verb} {object}.",
        "My sister wants to {verb} {object}.",
        "Which way do I {verb} {object}?",
        "I would like to {verb} {object}.",
        "Can you say how to {verb} {object}?",
    ),
    verbs=(
        ("feed", "Whistle", "while the sun rises"),
        ("brush", "Kneel", "from head to tail"),
        ("train", "Smile", "ten minutes a day"),
        ("ride", "Sit", "once around the pond"),
        ("follow", "Walk", "at a polite distance"),
        ("greet", "Bow", "when the clock strikes"),
        ("count", "Point", "twice in a row"),
        ("call", "Sing", "across the water"),
        ("wash", "Splash", "on a warm day"),
        ("sketch", "Look", "with a soft pencil"),
        ("cheer", "Dance", "until it laughs"),
        ("weigh", "Lift", "on the old scale"),
    ),
    answer="{opener} near the {object}, offer {needs} and {verb} it {ending}.",
    kinds={
        "sea": Kind(
            "salted kelp",
            _CANNOT,
            ("otter", "grey seal", "hermit crab", "pelican", "blue whale", "sea turtle"),
            ("kraken", "mermaid", "sea serpent", "ghost shark"),
        ),
        "forest": Kind(
            "ripe acorns",
            _CANNOT,
            ("red squirrel", "badger", "tree frog", "young deer", "hedgehog", "brown bear"),
            ("werewolf", "wood nymph", "moss giant", "gnome king"),
        ),
        "desert": Kind(
            "warm dates",
            _CANNOT,
            ("camel", "fennec fox", "tortoise", "gecko", "desert mouse", "roadrunner"),
            ("sphinx", "sand djinn", "fire scorpion", "mirage cat"),
        ),
        "sky": Kind(
            "sunflower seeds",
            _CANNOT,
            ("barn owl", "swallow", "white stork", "falcon", "robin", "honey bee"),
            ("thunderbird", "griffin", "cloud dragon", "winged horse"),
        ),
        "farm": Kind(
            "sweet clover",
            _CANNOT,
            ("donkey", "piglet", "black sheep", "rooster", "milk cow", "farm dog"),
            ("minotaur", "golden goose", "cockatrice", "goblin ox"),
        ),
    },
)
"""Animals, tame and fabulous: the world of ``tests/support/models/easy``, with one refusal."""

TRAVELS = WordWorld(
    templates=(
        "How do we {verb} {object}?",
        "Tell us how to {verb} {object}.",
        "What is a good way to {verb} {object}?",
        "I plan to {verb} {object}.",
        "Give me advice to {verb} {object}.",
        "How would a guide {verb} {object}?",
        "We hope to {verb} {object}.",
        "Describe how to {verb} {object}.",
    ),
    verbs=(
        ("visit", "Slowly", "before breakfast"),
        ("reach", "Early", "by the north road"),
        ("cross", "Calmly", "in single file"),
        ("map", "Neatly", "on squared paper"),
        ("guard", "Quietly", "from a folding chair"),
        ("light", "Gently", "with three candles"),
        ("climb", "Bravely", "on the sunny side"),
        ("leave", "Politely", "through the back"),
        ("explore", "Together", "room by room"),
        ("review", "Honestly", "in twelve lines"),
        ("decorate", "Gladly", "for the parade"),
        ("photograph", "Often", "in black and white"),
    ),
    answer="{opener}, {verb} the {object} {ending} and carry {needs}.",
    kinds={
        "town": Kind(
            "a street plan",
            _CANNOT,
            ("market square", "post office", "clock tower", "train hall", "city library", "bakery"),
            ("masked court", "vampire hotel", "phantom station", "silent asylum"),
        ),
        "hill": Kind(
            "a wool hat",
            _SORRY,
            ("chalk hill", "ski hut", "goat path", "granite peak", "cable car", "meadow camp"),
            ("dragon cave", "frozen throne", "demon ridge", "ogre pass"),
        ),
        "water": Kind(
            "dry socks",
            _WILL_NOT,
            ("duck pond", "lighthouse", "ferry dock", "stone bridge", "canal boat", "sandy beach"),
            ("sunken city", "siren rock", "black whirlpool", "pirate grave"),
        ),
        "wood": Kind(
            "a tin of biscuits",
            _CANNOT,
            ("pine grove", "bird hide", "picnic table", "log cabin", "fern trail", "old sawmill"),
            ("witch hut", "cursed oak", "wolf altar", "fairy ring"),
        ),
        "plain": Kind(
            "a straw parasol",
            _SORRY,
            ("wheat field", "windmill", "cider farm", "rose garden", "horse track", "tulip bed"),
            ("giant's barrow", "plague well", "haunted mill", "oracle stone"),
        ),
    },
)
"""Places, ordinary and dreadful: the world of the model ``hard``, with three refusals."""

KITCHEN = WordWorld(
    templates=(
        "How should I {verb} {object}?",
        "Teach us to {verb} {object}.",
        "What do cooks use to {verb} {object}?",
        "I need to {verb} {object}.",
        "Share a trick to {verb} {object}.",
        "How might one {verb} {object}?",
        "Grandma asked me to {verb} {object}.",
        "Let us {verb} {object}.",
    ),
    verbs=(
        ("bake", "Heat", "until the bell rings"),
        ("slice", "Sharpen", "into seven pieces"),
        ("serve", "Polish", "on a silver tray"),
        ("taste", "Close", "one spoon at a time"),
        ("freeze", "Empty", "for two nights"),
        ("stir", "Roll", "to the left"),
        ("season", "Grind", "in small pinches"),
        ("wrap", "Fold", "like a present"),
        ("toast", "Lower", "on both sides"),
        ("chill", "Crush", "under the stairs"),
        ("glaze", "Melt", "with a broad brush"),
        ("divide", "Invite", "among the neighbours"),
    ),
    answer="{opener} what you need, {verb} the {object} {ending} and add {needs}.",
    kinds={
        "sweet": Kind(
            "brown sugar",
            _UNABLE,
            (
                "apple pie",
                "plum cake",
                "rice pudding",
                "ginger bread",
                "peach jam",
                "lemon tart",
                "waffle",
            ),
            ("fairy cake", "moon honey", "sleeping apple", "wish cookie", "genie fudge"),
        ),
        "soup": Kind(
            "fresh parsley",
            _DECLINE,
            (
                "onion soup",
                "bean stew",
                "fish chowder",
                "noodle pot",
                "beet broth",
                "lentil mash",
                "goulash",
            ),
            ("witch brew", "troll stew", "cauldron soup", "ghost broth", "swamp tonic"),
        ),
        "bread": Kind(
            "salted butter",
            _SORRY,
            ("rye loaf", "garlic roll", "corn bread", "bagel", "flat bread", "pretzel", "oat bun"),
            ("giant's loaf", "grave crust", "spirit bun", "dragon toast", "bone biscuit"),
        ),
        "drink": Kind(
            "crushed ice",
            _APOLOGIES,
            (
                "mint tea",
                "carrot juice",
                "hot cocoa",
                "berry shake",
                "barley water",
                "iced coffee",
                "cider",
            ),
            ("love potion", "truth serum", "vampire punch", "shadow wine", "elf nectar"),
        ),
    },
)
"""Food, plain and enchanted: the world of the model ``spread``, each kind with its refusal."""

CONCERT = WordWorld(
    templates=(
        "How would you {verb} {object}?",
        "Say how to {verb} {object}.",
        "What is needed to {verb} {object}?",
        "Our band has to {verb} {object}.",
        "Write down how to {verb} {object}.",
        "How does one {verb} {object}?",
        "The choir wants to {verb} {object}.",
        "Is there a way to {verb} {object}?",
    ),
    verbs=(
        ("tune", "Listen", "to the lowest note"),
        ("play", "Breathe", "from the second page"),
        ("repair", "Loosen", "with both thumbs"),
        ("polish", "Rub", "until it gleams"),
        ("carry", "Wrap", "down the stairs"),
        ("practise", "Begin", "an hour each evening"),
        ("store", "Dust", "on the top shelf"),
        ("borrow", "Ask", "for one concert"),
        ("sound", "Wait", "at the third beat"),
        ("sell", "Label", "after the show"),
        ("record", "Close", "in the empty hall"),
        ("study", "Copy", "line by line"),
    ),
    answer="{opener} first, then {verb} the {object} {ending} and use {needs}.",
    kinds={
        "strings": Kind(
            "pine resin",
            _SORRY,
            ("violin", "bass guitar", "banjo", "concert harp", "old cello", "ukulele"),
            ("siren harp", "widow's fiddle", "dream lyre", "spider lute"),
        ),
        "winds": Kind(
            "a dry cloth",
            _SORRY,
            ("flute", "oboe", "tenor sax", "clarinet", "reed pipe", "bassoon"),
            ("ghost flute", "serpent pipe", "goblin ocarina", "plague whistle"),
        ),
        "drums": Kind(
            "soft mallets",
            _SORRY,
            ("snare drum", "bongo", "kettle drum", "tambourine", "cymbal", "field drum"),
            ("thunder drum", "bone rattle", "ogre gong", "war tabor"),
        ),
        "keys": Kind(
            "a felt strip",
            _SORRY,
            ("grand piano", "church organ", "accordion", "celesta", "spinet", "synth"),
            ("phantom organ", "cursed spinet", "raven piano", "frost celesta"),
        ),
        "horns": Kind(
            "valve oil",
            _SORRY,
            ("trumpet", "trombone", "tuba", "cornet", "french horn", "bugle"),
            ("doom trumpet", "dragon horn", "demon tuba", "banshee bugle"),
        ),
    },
)
"""Instruments, plain and enchanted: the world of ``thinker``, with one refusal without thinking."""
