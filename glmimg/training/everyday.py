"""Prompts of everyday things: what a model's own pictures show, against forgetting, unless they are to show others."""

from __future__ import annotations

__all__ = ["EVERYDAY"]

# Of the kinds that models meet most: animals, food, vehicles, plants, people, tools, places.
_THINGS = (
    "a dog; a red apple; a car; a tree; a cat; a house; a cup of coffee; a bicycle; a smiling woman; a fish; a book; "
    "a bird; a banana; a train; a flower; a chair; a horse; a slice of pizza; a boat; a mountain; a man with a beard; "
    "a guitar; a lion; a cake; a plane; a cactus; a lamp; a rabbit; an orange; a bus; a mushroom; a clock; a child; a "
    "cow; a loaf of bread; a rocket; a palm tree; a key; an elephant; a carrot; a truck; a rose; an umbrella; a bear; "
    "an ice cream; a lighthouse; a leaf; a phone; a penguin; a strawberry; a motorcycle; a forest; a shoe; a "
    "butterfly; a burger; a bridge; a sunflower; a camera; a frog; a lemon; a castle; a snowman; a hat; an owl"
)
_COLOURS = ("light blue", "yellow", "white", "green", "pink", "grey", "dark blue", "beige")


def _prompts() -> tuple[str, ...]:
    """First each thing once, in one of four ways; then in the next way, so that any beginning is varied."""
    things = _THINGS.split("; ")
    found = []
    for turn in range(4):
        for number, thing in enumerate(things):
            other, colour = things[(number + 5 + turn) % len(things)], _COLOURS[(number + turn) % len(_COLOURS)]
            ways = (thing, f"{thing} on a {colour} background", f"{thing} and {other}", f"{thing} next to {other}")
            found.append(ways[(number + turn) % len(ways)])
    return tuple(found)


EVERYDAY = _prompts()
