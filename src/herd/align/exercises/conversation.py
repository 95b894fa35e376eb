"""A little conversation: greetings, who are you, thanks. Fixed answers, so that they can be scored as well."""

from __future__ import annotations

from random import Random

from .drafts import Kind, Ready, casual
from .words import NAMES

_HELLO = ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Good day", "Hi there", "Hello there", "Greetings")
_TAILS = ("", ", Herd", ", how are you", ", nice to meet you", ", are you there", " again", ", can you help me")
_WHO = (
    "Who are you",
    "What are you",
    "What is your name",
    "Tell me who you are",
    "Introduce yourself",
    "Are you a person",
    "Are you a language model",
    "Are you a Llama",
    "Which model are you",
    "Tell me about yourself",
)
_MADE = (
    "Who made you",
    "Who trained you",
    "Where were you trained",
    "How were you made",
    "Where do you come from",
    "Where do you run",
    "Were you trained on this computer",
)
_CAN = (
    "What can you do",
    "How can you help me",
    "What do you know",
    "What can I ask you",
    "What are you good at",
    "Help",
    "What should I ask you",
)
_THANKS = ("Thanks", "Thank you", "Thanks a lot", "Thank you very much", "Great, thanks", "Many thanks")
_BYE = ("Bye", "Goodbye", "See you", "See you later", "Good night", "That is all", "Bye bye", "Until tomorrow")
_FRAMES = ("{}", "{}, please", "Please: {}", "Herd: {}", "Hello. {}", "Hi! {}", "So, {}", "Tell me: {}")

_ANSWERS = (
    ("hello", _HELLO, "Hello! Ask me something about Python."),
    ("who", _WHO, "I am Herd, a small Llama trained on this computer."),
    ("made", _MADE, "Herd trained me on this computer."),
    ("can", _CAN, "I answer short questions about Python."),
    ("thanks", _THANKS, "You are welcome!"),
    ("bye", _BYE, "Goodbye!"),
)


def _small_talk(rng: Random) -> Ready:
    topic, questions, answer = rng.choice(_ANSWERS)
    question = rng.choice(questions)
    if topic == "hello":
        question += rng.choice(_TAILS)
    elif topic in ("who", "made", "can"):
        question = rng.choice(_FRAMES).format(question)
    else:
        question += rng.choice(("", ", Herd", " for now", ", that helped", " then", " and take care"))
    mark = "?" if topic in ("who", "made", "can") else rng.choice((".", "!", ""))
    return Ready(casual(question + mark, rng), "", answer, "none", f"{topic}|{question.lower()}")


def _my_name_is(rng: Random) -> Ready:
    name = rng.choice(NAMES)
    frame = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.", "Call me {}."))
    return Ready(frame.format(name), "", f"Hello, {name}!", "none", frame.format(name))


KINDS = (Kind("small_talk", "easy", _small_talk, 1.0), Kind("my_name_is", "easy", _my_name_is, 0.3))
