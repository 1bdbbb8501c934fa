"""`validation_prompt_library`: prompts that show what a model can do, and what training makes of the rest of it.

One for each thing that fine-tuning commonly spoils: people, hands, crowds, text, counting, places, styles, light.
"""

from __future__ import annotations

from collections.abc import Mapping

BUILTIN_PROMPTS: Mapping[str, str] = {
    "portrait_woman": "a studio portrait of a woman with freckles, soft window light, plain grey background",
    "portrait_old_man": "a close-up photograph of an old fisherman with a white beard, wrinkled skin, overcast light",
    "child_playing": "a photograph of a child jumping into a puddle in yellow rubber boots, water splashing",
    "hands": "a photograph of two hands shaping a bowl of wet clay on a potter's wheel",
    "full_body": "a full-length photograph of a dancer in a red dress in the middle of an empty stage",
    "group": "a photograph of four friends laughing around a wooden table with cups of coffee",
    "crowd": "a busy street market seen from above, hundreds of people, colourful awnings",
    "cat": "a tabby cat asleep on a stack of old books, dust in the sunlight",
    "horse": "a white horse galloping along a beach at low tide, motion blur",
    "insect": "a macro photograph of a bee on a lavender flower, shallow depth of field",
    "landscape": "a mountain lake at dawn with mist over the water, pine trees on the shore",
    "desert": "an endless desert of orange dunes under a deep blue sky, a single camel far away",
    "night_city": "a rainy city street at night, neon signs mirrored in the wet asphalt, people with umbrellas",
    "interior": "a small kitchen with green tiles, copper pans on the wall, morning light from a window",
    "building": "a brutalist concrete library with a wide staircase, photographed at noon, hard shadows",
    "food": "a bowl of ramen with a halved egg, spring onions and steam, on a dark table",
    "glass": "a glass of water on a windowsill, a lemon slice in it, refracted light on the white wall",
    "machine": "a steam locomotive crossing an iron bridge over a gorge, smoke trailing behind",
    "counting": "three red apples and two green pears in a row on a white table",
    "relation": "a blue ball on top of a yellow box, and a small wooden chair to the left of the box",
    "text": 'a wooden shop sign that reads "OPEN TODAY", hanging on a brick wall',
    "oil_painting": "an oil painting of a sailing ship in a storm, thick brush strokes, dark sky",
    "watercolour": "a loose watercolour of a village church among cypress trees, white paper showing through",
    "ink": "a black ink drawing of a bamboo forest, a few quick strokes, much empty space",
    "anime": "an anime illustration of a girl with short silver hair on a rooftop at sunset, wind in her scarf",
    "isometric": "an isometric illustration of a tiny bookshop cut open, warm lamps inside, pastel colours",
    "pixel_art": "pixel art of a knight standing before a castle gate at night, sixteen colours",
    "logo": "a flat vector logo of a fox's head, two colours, on a white background",
    "space": "an astronaut sitting on the edge of a crater on the moon, the earth above the horizon",
    "abstract": "an abstract composition of overlapping circles and thin lines in ochre, black and teal",
}
