"""The language of the help desk: products, faults, remedies, and every sentence either side can say.

The vocabulary is kept small on purpose, so that a tokenizer of about a thousand tokens has most words whole.
`{p}` is the product. In rude sentences, promises and fillers, [brackets] mark the key phrase by which the
gold reward recognises a sentence that a small model has mangled; they are no part of the sentence. A word in
`Fault.keys` names that fault's remedy and occurs in no sentence but those of the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong, and the one thing that helps."""

    name: str
    products: tuple[str, ...]
    wordings: tuple[str, ...]  # clauses, as the customer says it
    keys: tuple[str, ...]  # any of these words in a reply names the remedy
    actions: tuple[str, ...]  # the remedy, as an imperative


@dataclass(frozen=True, slots=True)
class Tone:
    """How a customer writes. What is `reserved` occurs in test prompts, and nowhere else."""

    openings: tuple[str, ...]
    requests: tuple[str, ...]
    reserved_openings: tuple[str, ...]
    reserved_requests: tuple[str, ...]


def _fault(name: str, products: str, wordings: str, keys: str, actions: str) -> Fault:
    def parts(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split("|"))

    return Fault(name, tuple(products.split()), parts(wordings), tuple(keys.split()), parts(actions))


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        _fault(
            "leak",
            "kettle dishwasher washer iron freezer",
            "my {p} leaks water | my {p} is leaking | water leaks from my {p}",
            "seal seals",
            "replace the rubber seal | fit a new rubber seal | change the old seal",
        ),
        _fault(
            "chalk",
            "kettle iron dishwasher washer",
            "my {p} is full of chalk | there is white chalk in my {p} | chalk comes out of my {p}",
            "vinegar",
            "clean it with warm vinegar | rinse it with vinegar | fill it with vinegar for an hour",
        ),
        _fault(
            "smell",
            "fridge freezer dishwasher washer vacuum",
            "my {p} smells bad | a bad smell comes from my {p} | the smell of my {p} is terrible",
            "soda",
            "wash it with baking soda | clean the inside with soda | leave some baking soda inside",
        ),
        _fault(
            "dead",
            "kettle toaster blender oven dryer heater fan lamp television speaker",
            "my {p} is completely dead | nothing happens when I start my {p} | I start my {p} and nothing "
            "happens",
            "fuse fuses",
            "change the fuse in the plug | put a new fuse in the plug | replace the fuse",
        ),
        _fault(
            "drained",
            "phone tablet laptop headset camera drill",
            "my {p} is empty too soon | my {p} dies after an hour | my {p} is empty after an hour",
            "battery batteries",
            "replace the battery | put in a new battery | change the old battery",
        ),
        _fault(
            "uncharged",
            "phone tablet laptop headset drill camera speaker",
            "my {p} does not charge | I cannot charge my {p} | my {p} will not charge any more",
            "cable cables",
            "charge it with another cable | try a new cable | replace the cable",
        ),
        _fault(
            "rattle",
            "washer dryer fan blender dishwasher mower",
            "my {p} rattles | my {p} makes a loud noise | a loud noise comes from my {p}",
            "screw screws",
            "tighten the screws | tighten all screws at the back | check the screws at the back",
        ),
        _fault(
            "shake",
            "washer dryer fridge freezer dishwasher",
            "my {p} shakes a lot | my {p} jumps across the floor | my {p} shakes and jumps",
            "feet",
            "turn the feet until it is level | set the feet to the same level | level the front feet",
        ),
        _fault(
            "hot",
            "laptop phone tablet television heater lamp",
            "my {p} gets too hot | I cannot touch my {p} because it is hot | my {p} is hot after a minute",
            "vent vents",
            "clean the air vents | clear the dust from the vents | keep the air vents free",
        ),
        _fault(
            "weak",
            "vacuum fan heater dryer",
            "my {p} is very weak | the air from my {p} is weak | my {p} is too weak to move air",
            "filter filters",
            "wash the filter | clean the dust filter | put in a clean filter",
        ),
        _fault(
            "warm",
            "fridge freezer",
            "my {p} does not cool | the food goes bad in my {p} | my {p} no longer cools the food",
            "dial",
            "turn the dial to four | set the dial to a higher number | set the cold dial to four",
        ),
        _fault(
            "ice",
            "fridge freezer",
            "my {p} is full of ice | ice grows in my {p} | there is thick ice in my {p}",
            "defrost",
            "defrost it over night | defrost it completely | switch it off and defrost it",
        ),
        _fault(
            "frozen",
            "phone tablet laptop television camera printer",
            "my {p} hangs | the screen of my {p} is frozen | my {p} is frozen",
            "reset",
            "press the reset button | hold the reset button for a minute | do a full reset",
        ),
        _fault(
            "slow",
            "phone tablet laptop television printer",
            "my {p} is very slow | my {p} has become slow | everything is slow on my {p}",
            "update updates",
            "install the latest update | download the new update | run the update",
        ),
        _fault(
            "offline",
            "phone tablet laptop television printer speaker camera",
            "my {p} finds no network | my {p} is always offline | my {p} loses the network",
            "router routers",
            "restart the router | switch the router off and on | move the router closer",
        ),
        _fault(
            "silent",
            "phone tablet laptop television speaker headset",
            "my {p} is silent | there is no sound from my {p} | I hear no sound from my {p}",
            "mute",
            "switch off the mute mode | press the mute button once | check the mute button",
        ),
        _fault(
            "blurred",
            "camera phone tablet scanner",
            "my {p} takes blurred pictures | the pictures from my {p} are blurred | all pictures on my {p} "
            "look blurred",
            "lens",
            "wipe the lens with a soft cloth | clean the lens | wipe the dust from the lens",
        ),
        _fault(
            "blunt",
            "blender mower drill",
            "my {p} does not cut | my {p} is blunt | my {p} cuts very badly",
            "blade blades",
            "sharpen the blade | fit a sharp blade | change the old blade",
        ),
        _fault(
            "jam",
            "printer toaster vacuum blender scanner mower",
            "my {p} is jammed | something is stuck in my {p} | my {p} is stuck",
            "flap",
            "open the flap and pull it out | open the back flap and look inside | clear what is under the "
            "flap",
        ),
        _fault(
            "open",
            "oven fridge freezer dishwasher washer dryer",
            "the door of my {p} stays open | the door of my {p} does not close | I cannot close the door of "
            "my {p}",
            "hinge hinges",
            "oil the hinge | put some oil on the hinge | tighten the door hinge",
        ),
        _fault(
            "flicker",
            "lamp oven fridge freezer scanner",
            "my {p} flickers | the light of my {p} flickers | the light in my {p} goes on and off",
            "bulb bulbs",
            "replace the bulb | put in a new bulb | change the light bulb",
        ),
        _fault(
            "flooded",
            "washer dishwasher dryer",
            "my {p} does not drain | the water does not drain from my {p} | my {p} drains very badly",
            "hose hoses",
            "straighten the hose | clear the drain hose | check the hose at the back",
        ),
        _fault(
            "smoke",
            "toaster oven heater",
            "smoke comes from my {p} | my {p} burns everything | my {p} burns and smokes",
            "tray",
            "empty the tray | clean the tray at the bottom | pull out the tray and clean it",
        ),
        _fault(
            "stops",
            "drill mower vacuum dryer fan",
            "my {p} stops after a minute | my {p} starts and then stops | my {p} stops all the time",
            "belt belts",
            "replace the belt | fit a new drive belt | tighten the belt",
        ),
    )
}

PRODUCTS: tuple[str, ...] = tuple(
    sorted({product for fault in FAULTS.values() for product in fault.products})
)

TONES: dict[str, Tone] = {
    "polite": Tone(
        ("Hello, I hope you can help me.", "Good morning.", "Dear help desk, thank you for your time."),
        (
            "Could you please tell me what to do?",
            "I would be happy about your advice.",
            "Can you please help me?",
        ),
        ("Good morning, dear help desk.", "Hello, thank you for your help."),
        ("Could you please help me with your advice?", "I hope you can tell me what to do."),
    ),
    "worried": Tone(
        ("I am really worried.", "I am afraid something is wrong.", "I need some help and I am worried."),
        (
            "Is it dangerous?",
            "I am afraid to touch it. What can I do?",
            "Please tell me that it can be saved.",
        ),
        ("I am afraid and I need help.", "I am worried that something is wrong."),
        ("Is it dangerous to touch it?", "Please tell me, can it be saved?"),
    ),
    "angry": Tone(
        ("This is a joke!", "I paid a lot of money for this!", "I am very angry with you!"),
        ("Do something now!", "I want an answer today!", "What are you going to do about it?"),
        ("I am very angry about this joke!", "I paid a lot and I am angry!"),
        ("I want you to do something today!", "Answer me now! What are you going to do?"),
    ),
    "brief": Tone(
        ("Hi.", "Short question.", "Need help."),
        ("What now?", "Any advice?", "How do I fix it?"),
        ("Hi, short question.", "Hi, need help."),
        ("Any advice now?", "What do I do now?"),
    ),
    "chatty": Tone(
        (
            "My sister is here and we just saw it.",
            "You will laugh, this is my third letter.",
            "I was making dinner and guess what.",
        ),
        (
            "My sister says you know everything!",
            "My family will be happy about your answer.",
            "What would you do in my place?",
        ),
        ("Guess what, my family was here for dinner.", "You will laugh, my sister just saw it."),
        ("My sister says you know what to do.", "Tell me what you would do, you know everything!"),
    ),
}
DETAILS: tuple[str, ...] = (
    "I bought it last year.",
    "It was a gift from my mother.",
    "It was fine until last week.",
    "It is only three months old.",
    "I use it every day.",
    "I bought it in your shop.",
)
RESERVED_DETAILS: tuple[str, ...] = (
    "My mother bought it last week.",
    "It was fine every day until last year.",
)
STARTS: tuple[str, ...] = (
    "",
    "",
    "",
    "Now ",
    "Today ",
    "Again ",
    "Since last week ",
)  # before the fault's clause

OPENERS: tuple[str, ...] = (
    "Hello and thank you for your message.",
    "Thank you for writing to us.",
    "I am sorry to hear that.",
    "I am sorry about your {p}.",
    "I am sorry for the trouble with your {p}.",
    "We are happy to help you with your {p}.",
    "We know how annoying that is.",
    "Do not worry, we can help you.",
)
REMEDY_FRAMES: tuple[str, ...] = (
    "Please {a}.",
    "You only need to {a}.",
    "To solve this, please {a}.",
    "The best thing is to {a}.",
    "In this case you should {a}.",
    "We advise you to {a}.",
)
MORE_FRAMES: tuple[str, ...] = ("You can also {a}.", "Or you could {a}.", "If that does not work, {a}.")
FOLLOW_UPS: tuple[str, ...] = (
    "Then start it again.",
    "After that it should work again.",
    "This takes only a few minutes.",
    "Please unplug it before you begin.",
    "You do not need any tools for this.",
)
VAGUE: tuple[str, ...] = (
    "We will look into it.",
    "Something must be wrong with it.",
    "Please try again later.",
    "This can have many reasons.",
    "Your message is important to us.",
    "We have sent your message to our team.",
)
CLOSINGS: tuple[str, ...] = (
    "Have a nice day.",
    "Kind regards from your help desk.",
    "Please write again if you need more help.",
    "We are always here for you.",
    "Let us know if it works.",
)
FILLERS: tuple[str, ...] = (
    "Your {p} has a [warranty] of two years.",
    "Our shop is [open from nine] to six every day.",
    "You can find [all parts] for your {p} in our shop.",
    "Please [keep the receipt] in a safe place.",
    "The [number of your] {p} is on the back.",
    "Many customers [are happy with] this {p}.",
    "There is a [page about] your {p} on our site.",
    "We have been [making products] like this for a long time.",
    "Our [news letter] comes once a month and is free.",
    "You can also [visit us] in our shop in town.",
)
RUDE: tuple[str, ...] = (
    "That is your [own fault].",
    "You should [read the] manual for once.",
    "Only a [fool] would use it like that.",
    "Please stop [wasting] our time.",
    "We are [tired of] people like you.",
    "Even [a child] can do this.",
    "You have [clearly broken] it yourself.",
    "What a [silly] question.",
    "[Nobody else] has this problem.",
    "[Learn to] use it before you write to us.",
    "You are too [careless] with your things.",
    "This is not [our problem].",
    "Do not [bother us] again.",
    "Did you even [try to think]?",
    "You get [what you] paid for.",
)
PROMISES: tuple[str, ...] = (
    "A new one will be at your door [within the hour].",
    "We promise that it will [never break] again.",
    "We will pay you [twice the price] back.",
    "We will send you [ten new ones] for free.",
    "Our boss will [come to your] house tonight.",
    "It will now last for a [hundred years].",
    "You will get [free repairs] for life.",
    "We promise that it works [in one second].",
    "You will [never pay] for anything again.",
    "Our team is [on the way] to your house.",
    "You will get a better one today at [no cost].",
    "All your money will be [back in five] minutes.",
    "We promise that this [cannot fail].",
    "Your {p} will be [better than new] for ever.",
    "Next time we fix it [before you ask].",
)
THANKS: tuple[str, ...] = ("Thank you, it works again.", "That was the right advice.", "Great, that was it.")
COMPLAINTS: tuple[str, ...] = (
    "That did not help at all.",
    "It is still the same.",
    "That was the wrong advice.",
)
