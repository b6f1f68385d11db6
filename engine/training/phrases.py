"""The styles' names and the words people use for them.

Each style has phrases to train on and a few held out, which no training run sees: they measure what free text
does. Phrases are made longer by templates and joined with subjects ("me as ..."), so the word pieces that
matter are seen among ones that do not. An empty prompt, and talk about people only, mean the plain photo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Style:
    """One style: its id in files, its name and prompt on the page, and its phrases."""

    id: str
    name: str
    prompt: str
    phrases: tuple[str, ...]
    held_out: tuple[str, ...]


def _style(id_: str, name: str, prompt: str, phrases: str, held_out: str) -> Style:
    split = tuple(tuple(" ".join(part.split()) for part in text.split(",")) for text in (phrases, held_out))
    return Style(id_, name, prompt, (prompt, *split[0]), split[1])


STYLES: tuple[Style, ...] = (
    _style(
        "photo",
        "Photo",
        "a natural photo",
        """photo, photograph, a photo, original camera image, no style, unchanged, realistic video, natural photograph,
           plain webcam footage, raw footage, true to life, unprocessed picture, ordinary photo, realistic, realism,
           photorealistic, normal, no effect, without any filter, off, none, plain video, clean camera picture, just me,
           as it is, real life, natural colours, natural colors, high quality photo, a clear photograph of a person,
           camera, webcam, leave it as it is, original, real, documentary footage, studio photograph, portrait photo,
           sharp natural image, neutral, lifelike, true colours, unedited video, live camera""",
        "nothing changed, plain camera, real photograph, unfiltered, untouched video",
    ),
    _style(
        "watercolor",
        "Watercolor",
        "watercolor painting",
        """watercolour painting, soft watercolour washes, aquarelle on paper, pastel water paint, loose watercolor
        illustration, delicate wash painting, wet paint bleeding on paper, light aquarelle, painted with
        water colours, water color, watercolor, watercolour, aquarelle, water colour sketch, line and wash,
        ink and wash illustration, gentle washes of paint, soft painted illustration, children's book
        illustration, storybook illustration, picture book painting, pastel illustration, gouache, soft
        pastel painting, diluted paint, translucent paint, wet on wet, watercolor portrait, watercolor
        paper, dreamy soft painting, light and airy painting, pale wash, pigment on wet paper, beatrix
        potter illustration, hand painted watercolor, brush and water, washed colours, delicate painting,
        soft edges and washes, tender illustration, watercolor art, a painted postcard, fairy tale
        illustration""",
        "watercolour portrait, painted with watercolors, an aquarelle, soft wash illustration, water paints",
    ),
    _style(
        "comic",
        "Comic",
        "comic book",
        """comic, comics, cartoon, cartoon with bold outlines, graphic novel panel, superhero comic art, cel shaded
        cartoon, bright comic strip, toon shading, cartoon character, marvel style comic page, american
        comic, saturday morning cartoon, cel shading, animated cartoon, bold black outlines and flat
        colours, superhero, comic hero, toon, animation, animated series, anime, manga in colour, anime
        character, japanese anime, flat colour cartoon, tv cartoon, cartoonish, thick outlines, caricature,
        disney cartoon, batman comic, spider man comic, bande dessinee, tintin, comic panel, vivid cartoon,
        cell shaded, video game toon look, borderlands, drawn cartoon hero, funny cartoon, family guy""",
        "inked and coloured cartoon, comic strip hero, a cartoon person, graphic novel art, toon shaded",
    ),
    _style(
        "pencil",
        "Pencil",
        "pencil sketch",
        """pencil, pencil drawing, graphite drawing on paper, hand drawn sketch, charcoal and pencil portrait, black
        and white pencil art, soft graphite shading, sketchbook drawing, monochrome sketch, graphite,
        sketch, charcoal, charcoal drawing, drawing, a drawing, hand drawn, shaded drawing, sketchbook page,
        rough sketch, crosshatched pencil, hatching, graphite portrait, realistic pencil portrait, artist's
        sketch, pencil strokes, grey pencil, chalk drawing, crayon drawing, academic drawing, figure
        drawing, pencil on paper, street portrait sketch, soft pencil, sketched, scribble, doodle, leonardo
        da vinci sketch, study in graphite, a-ha take on me, pencil shading, sketch me, draw me""",
        "lead pencil study, drawn with a pencil, a graphite sketch, charcoal sketch, sketchy drawing",
    ),
    _style(
        "ink",
        "Ink",
        "black ink drawing",
        """ink, ink drawing, india ink, brush and ink, pen and ink, black ink on cream paper, ink illustration, sumi-e,
        inkwash, chinese ink, calligraphy ink, bold black ink, linocut, lino print, stencil, woodcut in
        black, etching, engraving, pen drawing, fountain pen drawing, black and white manga, manga, manga
        panel, noir comic, sin city, frank miller, high contrast black and white, black and white graphic
        art, black silhouettes, silhouette, scratchboard, ink blots, stark black and white, ink sketch,
        banksy stencil, fineliner drawing, ballpoint, black marker, graphic black ink, inked lines,
        monochrome print, paper cut""",
        "drawn in ink, pen and ink portrait, black linocut, a manga page, dark ink strokes",
    ),
    _style(
        "neon",
        "Neon",
        "neon lights",
        """neon, glowing neon edges, cyberpunk neon glow, tron style glowing lines, synthwave neon outline, neon sign,
        electric glowing contours, fluorescent outlines in the dark, glow in the dark, cyberpunk city night,
        cyberpunk, tron, synthwave, vaporwave, retrowave, blacklight, laser lines, laser show, glowing
        outlines, luminous contours, night club lights, electric, hologram, holographic, neon tubes, glowing
        wires, blade runner, tokyo at night, rave, disco lights, ultraviolet, uv light, led strips, outrun,
        science fiction glow, futuristic glow, pink and cyan light, electric lines, glowing edges, digital
        ghost, make it glow, light painting, night city""",
        "bright neon sign, glowing contours at night, neon cyberpunk, tron lines, fluorescent glow",
    ),
    _style(
        "riso",
        "Riso dots",
        "risograph halftone print",
        """halftone, halftone print, risograph, risograph poster with dots, newspaper dots, dotted print, screen print
        with dot pattern, two colour riso print, ben day dots, vintage dotted print, dotted magazine print,
        dots, dot pattern, newsprint, newspaper, newspaper photo, printed dots, halftone dots, riso, riso
        print, zine print, pink and blue print, punk zine, offset printing, roy lichtenstein, lichtenstein
        dots, two ink print, screen tone, halftone screen, cheap print, magazine print, polka dots, printed
        flyer, gig poster, raster dots, dot matrix, dotted, photocopy, cmyk dots, print with coarse dots,
        stippled, stippling, pointillism, retro print""",
        "dotted newspaper print, halftone poster, a riso poster, big printed dots, two colour dotted print",
    ),
    _style(
        "pixel",
        "Pixel art",
        "pixel art",
        """pixels, mosaic tiles, mosaic, 8-bit video game pixels, ceramic tile mosaic, blocky pixelated image,
        minecraft blocks, minecraft, roman mosaic, low resolution pixels, retro game graphics, pixelated, 8
        bit, 16 bit game, video game, nintendo, super mario, arcade game, gameboy, lego, lego bricks, lego
        figure, bricks, blocks, tiles, voxel, voxels, retro video game, sprite, game sprite, censored, pixel
        character, big pixels, square tiles, bathroom tiles, byzantine mosaic, old computer game, commodore
        64, dos game, cross stitch, roblox, blocky""",
        "pixelated squares, an 8 bit game, tile mosaic, retro pixels, pixel game character",
    ),
    _style(
        "ukiyo",
        "Ukiyo-e",
        "ukiyo-e woodblock print",
        """ukiyo-e, japanese woodcut, edo period print, hokusai style woodblock, old japanese print, traditional
        japanese art, woodblock print with indigo and ochre, japanese ink print, hiroshige landscape,
        woodblock, woodblock print, hokusai, hiroshige, the great wave, japanese print, japanese painting,
        japan, japanese art, samurai print, geisha, samurai, kabuki portrait, utamaro, edo, kyoto print,
        woodcut, oriental print, antique asian print, floating world, indigo and ochre, japanese scroll,
        kanagawa, classic japanese illustration, shin hanga, asian woodblock, japanese, traditional
        woodblock, japanese poster, old woodcut, meiji print, color woodcut""",
        "antique woodcut from japan, a hokusai print, japanese block print, edo woodblock, hiroshige print",
    ),
    _style(
        "thermal",
        "Thermal",
        "thermal camera",
        """thermal, heat map, heat vision, infrared, infrared camera, thermal imaging, heat camera, thermography,
        thermal image, infrared heat, predator vision, predator, heatmap, body heat, hot and cold colours,
        temperature map, flir, heat signature, infrared vision, thermal vision, warm and cold, fever, fire
        colours, heat, hot, temperature, inferno, false colour heat, lava, fire, flames, burning, ember,
        molten, glowing heat, infra red, thermal scan, thermal scope, heat sensor, magma""",
        "infrared thermal picture, heat vision camera, thermal camera image, predator heat vision, a heat map of me",
    ),
    _style(
        "blueprint",
        "Blueprint",
        "blueprint drawing",
        """blueprint, technical drawing, architect's plan, white lines on blue, engineering drawing, cyanotype,
        construction plan, architectural blueprint, draft, drafting, technical blueprint, schematic, blue
        plan, white chalk on blue, graph paper, blue graph paper, technical plan, diagram, engineering
        blueprint, floor plan, architect, patent drawing, machine drawing, cad, cad drawing, wireframe,
        white outline on blue, blue paper drawing, engineer's sketch, design plan, construction drawing,
        plan, technical sketch, technical illustration, white lines, blueprint paper, inventor's plan,
        measured drawing, chalkboard, blueprint of a machine""",
        """architect's blueprint, a technical plan, blue engineering drawing, white line schematic, construction
        blueprint""",
    ),
    _style(
        "popart",
        "Pop art",
        "pop art poster",
        """pop art, andy warhol, warhol, warhol print, screen print, silkscreen, bold poster, loud colours, pink and
        yellow poster, sixties poster, pop art portrait, marilyn, marilyn monroe warhol, bright poster,
        psychedelic, psychedelic poster, acid colours, pop, vivid poster, silk screen, flat bold colours,
        four colour poster, hope poster, obama hope poster, shepard fairey, posterised, posterized, poster
        art, magenta and yellow, art print in bright colours, colour block, campaign poster, street poster,
        modern art print, campbell soup, factory print, crazy colours, colorful poster, trippy, wild
        colours, hippie, party poster""",
        "warhol silkscreen, pop art print, a loud pink poster, andy warhol portrait, posterised colours",
    ),
    _style(
        "vintage",
        "Vintage film",
        "vintage sepia film",
        """sepia, vintage, old film, old photograph, sepia photograph, antique photo, 1920s film, silent movie, silent
        film, faded photograph, daguerreotype, old movie, nostalgic film, retro film, grandma's photo album,
        vintage photo, film, brown toned photo, aged photograph, old timey, western, wild west photo, 19th
        century photograph, victorian photo, historical photo, wanted poster, old camera, sepia tone, kodak,
        analog film, nostalgia, charlie chaplin, the twenties, ancient photograph, 1900, black and white
        film, film noir, old black and white movie, cinema, monochrome film, antique""",
        "sepia movie, a faded old photo, vintage photograph, silent movie scene, old brown film",
    ),
    _style(
        "nightvision",
        "Night vision",
        "night vision",
        """night vision goggles, green night vision, military night vision, night scope, green phosphor, image
        intensifier, night camera, surveillance at night, soldier's goggles, green monitor, matrix, the
        matrix, matrix green, green screen monitor, old crt, green terminal, hacker, crt scan lines, night
        ops, special forces, goggles, spy camera, green glow, security camera at night, green light,
        phosphor, alien green, radar, radar screen, ghost hunting camera, green tint, nightvision, fallout
        terminal, monochrome green, green, scan lines, scanlines, cctv, surveillance, sniper scope,
        paranormal footage""",
        "night vision camera, green military goggles, seen through a night scope, green crt screen, night ops footage",
    ),
    _style(
        "oil",
        "Oil painting",
        "oil painting",
        """oil, oil on canvas, oil paint, classical oil painting, old master painting, rembrandt, thick oil paint,
        impasto, palette knife, canvas painting, rich oil colours, baroque portrait, renaissance painting,
        portrait in oils, vermeer, caravaggio, museum painting, painted portrait, brush strokes on canvas,
        acrylic painting, acrylic, painting, a painting, painterly, impressionism, impressionist painting,
        monet, manet, renoir, cezanne, expressive brush strokes, fine art, thick paint, girl with a pearl
        earring, mona lisa, leonardo painting, velazquez, canvas, painted by an old master, realistic
        painting, digital painting, concept art""",
        "painted in oils, a rembrandt portrait, impasto on canvas, old master portrait, oil colours",
    ),
    _style(
        "starry",
        "Starry night",
        "starry night by van gogh",
        """van gogh, starry night, van gogh painting, swirling blue and yellow brush strokes, post-impressionist
        painting, starry, thick swirling paint, vincent van gogh, starry sky painting, vincent, swirls,
        swirling strokes, swirling sky, blue and yellow swirls, dutch post-impressionism, cafe terrace at
        night, stars and swirls, night sky painting, swirling night, blue and gold painting, painted night,
        starry starry night, post impressionism, sunflowers van gogh, the starry night, spiral brush
        strokes, whirling strokes, stars, night sky, moon and stars, milky way, galaxy, cosmic painting,
        wheat field, swirly, curly strokes, blue night painting, expressive blue strokes, moonlight, dreamy
        night sky""",
        "gogh style, swirly starry painting, a van gogh night, swirling blue strokes, painted starry sky",
    ),
)

BY_ID = {style.id: style for style in STYLES}

_TEMPLATES = (
    "{}", "{}", "{}", "{} style", "in the style of {}", "make it look like {}", "turn me into {}", "a person as {}",
    "{}, high quality", "restyle the video as {}", "{} please", "portrait, {}", "me as {}", "me as a {}", "me in {}",
    "a {} of a man", "a {} of a woman", "{} effect", "{} look", "{} filter", "{}, detailed", "beautiful {}", "like {}",
    "i want {}", "show me as {}", "paint me as {}", "the whole room as {}", "{} art", "a face, {}", "my friends as {}",
)  # fmt: skip
_SUBJECTS = (
    "",
    "",
    "",
    "",
    "a man",
    "a woman",
    "a smiling person",
    "two people",
    "someone waving",
    "a portrait",
    "my room",
)


def random_prompt(style: Style, rng: np.random.Generator, *, held_out: bool = False) -> str:
    """A prompt for a style: a phrase in a template, sometimes with a subject; one photo in five has none at all."""
    if style.id == "photo" and not held_out and rng.random() < 0.4:
        return "" if rng.random() < 0.75 else str(rng.choice(_SUBJECTS[4:]))
    phrases: Sequence[str] = style.held_out if held_out else style.phrases
    template = "{}" if held_out or rng.random() < 0.3 else str(rng.choice(_TEMPLATES))
    text = template.format(phrases[int(rng.integers(len(phrases)))])
    subject = "" if held_out else str(rng.choice(_SUBJECTS))
    return f"{subject}, {text}" if subject else text
