"""The styles' names and the words people use for them.

Each style has phrases to train on and a few held out, which no training run sees: they measure what free text
does. Phrases are made longer by templates and joined with subjects ("me as ..."), so the word pieces that
matter are seen among ones that do not. An empty prompt, and talk about people only, mean the plain photo.

What else points to a style (artists, works, films, tools, places; `lexicon.txt`) is for the prompt reader alone. It was
written by one who had seen neither the held-out phrases of the tests nor what was misread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
        """photo, photograph, a photo, original camera image, no style, unchanged, realistic video, natural
        photograph, plain webcam footage, raw footage, true to life, unprocessed picture, ordinary photo,
        realistic, realism, photorealistic, normal, no effect, without any filter, off, none, plain video, clean
        camera picture, just me, as it is, real life, natural colours, natural colors, high quality photo, a clear
        photograph of a person, camera, webcam, leave it as it is, original, real, documentary footage, studio
        photograph, portrait photo, sharp natural image, neutral, lifelike, true colours, unedited video, live
        camera, no filter, remove the filter, turn it off, stop the effect, back to normal, show me as i am, do
        nothing, nothing, reset, no painting, plain me, hyperrealistic, 4k photo, dslr photo, just the camera, my
        real face, cinematic""",
        """nothing changed, plain camera, real photograph, unfiltered, untouched video, without effects, show the
        original""",
    ),
    _style(
        "watercolor",
        "Watercolor",
        "watercolor painting",
        """watercolour painting, soft watercolour washes, aquarelle on paper, pastel water paint, loose watercolor
        illustration, delicate wash painting, wet paint bleeding on paper, light aquarelle, painted with water
        colours, water color, watercolor, watercolour, aquarelle, water colour sketch, line and wash, ink and wash
        illustration, gentle washes of paint, soft painted illustration, children's book illustration, storybook
        illustration, picture book painting, pastel illustration, gouache, soft pastel painting, diluted paint,
        translucent paint, wet on wet, watercolor portrait, watercolor paper, dreamy soft painting, light and airy
        painting, pale wash, pigment on wet paper, beatrix potter illustration, hand painted watercolor, brush and
        water, washed colours, delicate painting, soft edges and washes, tender illustration, watercolor art, a
        painted postcard, fairy tale illustration, paint bleeding into paper, winnie the pooh illustration, the
        little prince, botanical illustration, runny paint, turner watercolour, tinted wash, watery paint, wash""",
        """watercolour portrait, painted with watercolors, an aquarelle, soft wash illustration, water paints, a
        child's story book""",
    ),
    _style(
        "comic",
        "Comic",
        "comic book",
        """comic, comics, cartoon, cartoon with bold outlines, graphic novel panel, superhero comic art, cel shaded
        cartoon, comic strip, toon shading, cartoon character, marvel style comic page, american comic, saturday
        morning cartoon, cel shading, animated cartoon, bold black outlines and flat colours, superhero, comic
        hero, toon, animation, animated series, anime, manga in colour, anime character, japanese anime, flat
        colour cartoon, tv cartoon, cartoonish, thick outlines, caricature, disney cartoon, batman comic, spider
        man comic, bande dessinee, tintin, comic panel, superman, marvel, dc comics, cell shaded, video game toon
        look, borderlands, drawn cartoon hero, funny cartoon, family guy, the simpsons, pixar, disney, studio
        ghibli, ghibli, scooby doo, looney tunes, rick and morty, asterix, spider verse, pokemon, speech bubbles,
        graphic novel""",
        """inked and coloured cartoon, comic strip hero, a cartoon person, graphic novel art, toon shaded, a hero
        from the funny pages""",
    ),
    _style(
        "pencil",
        "Pencil",
        "pencil sketch",
        """pencil, pencil drawing, graphite drawing on paper, hand drawn sketch, charcoal and pencil portrait, black
        and white pencil art, soft graphite shading, sketchbook drawing, monochrome sketch, graphite, sketch,
        charcoal, charcoal drawing, drawing, a drawing, hand drawn, shaded drawing, sketchbook page, rough sketch,
        crosshatched pencil, hatching, graphite portrait, realistic pencil portrait, artist's sketch, pencil
        strokes, grey pencil, crayon drawing, academic drawing, figure drawing, pencil on paper, street portrait
        sketch, soft pencil, sketched, scribble, doodle, leonardo da vinci sketch, study in graphite, a-ha take on
        me, pencil shading, sketch me, draw me, drawn, sketchbook, pencils, coloured pencils, crosshatching, line
        drawing, life drawing, police sketch, courtroom sketch, conte crayon, hand sketched""",
        """lead pencil study, drawn with a pencil, a graphite sketch, charcoal sketch, sketchy drawing, an artist's
        rough draft of me""",
    ),
    _style(
        "ink",
        "Ink",
        "black ink drawing",
        """ink, ink drawing, india ink, brush and ink, pen and ink, black ink on cream paper, ink illustration,
        sumi-e, inkwash, chinese ink, calligraphy ink, bold black ink, linocut, lino print, stencil, woodcut in
        black, etching, engraving, pen drawing, fountain pen drawing, black and white manga, manga, manga panel,
        noir comic, sin city, frank miller, high contrast black and white, black and white graphic art, black
        silhouettes, silhouette, scratchboard, ink blots, stark black and white, ink sketch, banksy stencil,
        fineliner drawing, ballpoint, black marker, graphic black ink, inked lines, monochrome print, paper cut,
        calligraphy, zen brush painting, black brush strokes, rorschach, quill and ink, dip pen, tattoo, black
        ink, inked, banksy, sharpie, chinese brush painting, pen""",
        "drawn in ink, pen and ink portrait, black linocut, a manga page, dark ink strokes, brush calligraphy",
    ),
    _style(
        "neon",
        "Neon",
        "neon lights",
        """neon, glowing neon edges, cyberpunk neon glow, tron style glowing lines, synthwave neon outline, neon
        sign, electric glowing contours, fluorescent outlines in the dark, glow in the dark, cyberpunk city night,
        cyberpunk, tron, synthwave, vaporwave, retrowave, blacklight, laser lines, laser show, glowing outlines,
        luminous contours, night club lights, electric, hologram, holographic, neon tubes, glowing wires, blade
        runner, tokyo at night, rave, disco lights, ultraviolet, uv light, led strips, outrun, science fiction
        glow, futuristic glow, pink and cyan light, electric lines, glowing edges, digital ghost, make it glow,
        light painting, night city, neon lights at night, glow, glowing, lasers, nightclub, disco, las vegas,
        luminous, fluorescent, light tubes, lightsaber, futuristic, sci-fi""",
        """bright neon sign, glowing contours at night, neon cyberpunk, tron lines, fluorescent glow, laser beams in
        the dark""",
    ),
    _style(
        "riso",
        "Riso dots",
        "risograph halftone print",
        """risograph, risograph poster with dots, screen print with dot pattern, two colour riso print, riso, riso
        print, zine print, pink and blue print, punk zine, offset printing, two ink print, cheap print, printed
        flyer, gig poster, photocopy, retro print, zine, fanzine, riso dots, risographed, risography, riso
        printer, two tone print, duotone, duotone print, duotone poster, misregistered print, overprinted inks,
        fluorescent pink and blue ink, soy ink print, indie zine cover, concert poster, band flyer, art fair
        print, mimeograph, ditto machine, spirit duplicator, stencil duplicator, two spot colours, grainy two
        colour print, printed with spot colours, teal and pink print, lo-fi print, indie poster, show poster,
        letterpress, block colours printed off register, photocopied zine, xerox, riso postcard, small press print""",
        """a riso poster, two colour dotted print, diy zine page, duotone artwork, a risograph flyer, photocopied
        punk poster""",
    ),
    _style(
        "pixel",
        "Pixel art",
        "pixel art",
        """pixels, 8-bit video game pixels, blocky pixelated image, minecraft blocks, minecraft, low resolution
        pixels, retro game graphics, pixelated, 8 bit, 16 bit game, video game, nintendo, super mario, arcade
        game, gameboy, lego, lego bricks, lego figure, bricks, blocks, voxel, voxels, retro video game, sprite,
        game sprite, censored, pixel character, big pixels, square pixels, old computer game, commodore 64, dos
        game, roblox, blocky, 8bit, atari, sega, tetris, pac man, zelda sprite, stardew valley, terraria, low res,
        pixelate, pixelation, jaggy pixels, tiny resolution, computer game from the eighties, space invaders, game
        console graphics, arcade, big square blocks, toy bricks, 16-bit""",
        "pixelated squares, an 8 bit game, retro pixels, pixel game character, nintendo game, a game sprite of me",
    ),
    _style(
        "ukiyo",
        "Ukiyo-e",
        "ukiyo-e woodblock print",
        """ukiyo-e, japanese woodcut, edo period print, hokusai style woodblock, old japanese print, traditional
        japanese art, woodblock print with indigo and ochre, japanese ink print, hiroshige landscape, woodblock,
        woodblock print, hokusai, hiroshige, the great wave, japanese print, japanese painting, japan, japanese
        art, samurai print, geisha, samurai, kabuki portrait, utamaro, edo, kyoto print, woodcut, oriental print,
        antique asian print, floating world, indigo and ochre, japanese scroll, kanagawa, classic japanese
        illustration, shin hanga, asian woodblock, japanese, traditional woodblock, japanese poster, old woodcut,
        meiji print, color woodcut, kabuki, kimono, great wave off kanagawa, sharaku, kyoto, mount fuji print,
        cherry blossom print, japanese screen painting, shogun""",
        """antique woodcut from japan, a hokusai print, japanese block print, edo woodblock, hiroshige print, a
        kabuki actor print""",
    ),
    _style(
        "thermal",
        "Thermal",
        "thermal camera",
        """thermal, heat map, heat vision, infrared, infrared camera, thermal imaging, heat camera, thermography,
        thermal image, infrared heat, predator vision, predator, heatmap, body heat, hot and cold colours,
        temperature map, flir, heat signature, infrared vision, thermal vision, fever, fire colours, heat, hot,
        temperature, inferno, false colour heat, lava, fire, flames, burning, ember, molten, glowing heat, infra
        red, thermal scan, thermal scope, heat sensor, magma, heat seeking, hot spots, warm areas glow, see my
        body temperature, airport fever scanner, house heat loss picture, firefighter camera, thermometer camera,
        infrared scan, false colour, thermal goggles, weather map colours, hot body""",
        """infrared thermal picture, heat vision camera, thermal camera image, predator heat vision, a heat map of
        me, my body temperature""",
    ),
    _style(
        "blueprint",
        "Blueprint",
        "blueprint drawing",
        """blueprint, blue print, technical drawing, architect's plan, white lines on blue, engineering drawing,
        cyanotype, construction plan, architectural blueprint, draft, drafting, technical blueprint, schematic,
        blue plan, graph paper, blue graph paper, technical plan, diagram, engineering blueprint, floor plan,
        architect, patent drawing, machine drawing, cad, cad drawing, wireframe, white outline on blue, blue paper
        drawing, engineer's sketch, design plan, construction drawing, plan, technical sketch, technical
        illustration, white lines, blueprint paper, inventor's plan, measured drawing, blueprint of a machine,
        blueprints, schematics, architectural drawing, architecture sketch, drafting paper, autocad, building
        plan, exploded drawing, circuit diagram, prussian blue print, wiring diagram""",
        """architect's blueprint, a technical plan, blue engineering drawing, white line schematic, construction
        blueprint, plans of a building""",
    ),
    _style(
        "popart",
        "Pop art",
        "pop art poster",
        """pop art, andy warhol, warhol, warhol print, screen print, silkscreen, bold poster, loud colours, pink and
        yellow poster, sixties poster, pop art portrait, marilyn, marilyn monroe warhol, bright poster,
        psychedelic, psychedelic poster, acid colours, pop, silk screen, flat bold colours, four colour poster,
        hope poster, obama hope poster, shepard fairey, posterised, posterized, poster art, magenta and yellow,
        art print in bright colours, colour block, campaign poster, street poster, modern art print, campbell
        soup, factory print, crazy colours, colorful poster, trippy, wild colours, hippie, party poster, roy
        lichtenstein, lichtenstein, keith haring, poster, political poster, propaganda poster, lsd trip, woodstock
        poster, the beatles, bold graphic poster, serigraph, 1960s poster""",
        """warhol silkscreen, pop art print, a loud pink poster, andy warhol portrait, posterised colours, a
        psychedelic sixties poster""",
    ),
    _style(
        "vintage",
        "Vintage film",
        "vintage sepia film",
        """sepia, vintage, old film, old photograph, sepia photograph, antique photo, 1920s film, silent movie,
        silent film, faded photograph, daguerreotype, old movie, nostalgic film, retro film, grandma's photo
        album, vintage photo, film, brown toned photo, aged photograph, old timey, western, wild west photo, 19th
        century photograph, victorian photo, historical photo, wanted poster, old camera, sepia tone, kodak,
        analog film, nostalgia, charlie chaplin, the twenties, ancient photograph, 1900, black and white film,
        film noir, old black and white movie, cinema, monochrome film, antique, super 8, 8mm film, old time photo,
        polaroid, black and white movie, old family photo, sepia toned, edwardian, civil war photo, film grain,
        wet plate photo, casablanca, old hollywood""",
        """sepia movie, a faded old photo, vintage photograph, silent movie scene, old brown film, a picture from
        great grandma's time""",
    ),
    _style(
        "nightvision",
        "Night vision",
        "night vision",
        """night vision goggles, green night vision, military night vision, night scope, green phosphor, image
        intensifier, night camera, surveillance at night, soldier's goggles, green monitor, matrix, the matrix,
        matrix green, green screen monitor, green terminal, hacker, night ops, special forces, goggles, spy
        camera, green glow, security camera at night, phosphor, alien green, radar, radar screen, ghost hunting
        camera, nightvision, fallout terminal, cctv, surveillance, sniper scope, night goggles, see in the dark,
        spy goggles, commando, night sight, paranormal footage, military goggles, splinter cell, navy seals,
        wildlife night camera, trail camera, stealth mission, green infrared camera, sniper, call of duty night
        mission, blair witch, night patrol, hacker screen""",
        """night vision camera, green military goggles, seen through a night scope, a soldier's night sight, night
        ops footage, ghost hunters at night""",
    ),
    _style(
        "oil",
        "Oil painting",
        "oil painting",
        """oil, oil on canvas, oil paint, classical oil painting, old master painting, rembrandt, thick oil paint,
        impasto, palette knife, canvas painting, rich oil colours, baroque portrait, renaissance painting,
        portrait in oils, vermeer, caravaggio, museum painting, painted portrait, brush strokes on canvas, acrylic
        painting, acrylic, painting, a painting, painterly, expressive brush strokes, fine art, thick paint, girl
        with a pearl earring, mona lisa, leonardo painting, velazquez, canvas, painted by an old master, realistic
        painting, digital painting, concept art, baroque, renaissance, rubens, titian, goya, frans hals, royal
        portrait, classical painting, dutch master, bob ross, painted, old masters, paint me, brush strokes,
        gallery painting, oils, dutch golden age, oil pastel""",
        """painted in oils, a rembrandt portrait, impasto on canvas, old master portrait, oil colours, a baroque
        painting""",
    ),
    _style(
        "starry",
        "Starry night",
        "starry night by van gogh",
        """van gogh, starry night, van gogh painting, swirling blue and yellow brush strokes, post-impressionist
        painting, starry, thick swirling paint, vincent van gogh, starry sky painting, vincent, swirls, swirling
        strokes, swirling sky, blue and yellow swirls, dutch post-impressionism, cafe terrace at night, stars and
        swirls, night sky painting, swirling night, blue and gold painting, painted night, starry starry night,
        post impressionism, sunflowers van gogh, the starry night, spiral brush strokes, whirling strokes, stars,
        night sky, moon and stars, milky way, galaxy, cosmic painting, wheat field, swirly, curly strokes, blue
        night painting, expressive blue strokes, moonlight, dreamy night sky, gogh, swirling paint, starlight,
        swirling brushwork, the scream, edvard munch, expressionism, swirly sky, painted stars, cosmos, whirlpool
        of paint""",
        """gogh style, swirly starry painting, a van gogh night, swirling blue strokes, painted starry sky, stars
        whirling in paint""",
    ),
    _style(
        "halftone",
        "Halftone",
        "black halftone dots on newsprint",
        """halftone, halftone print, newspaper dots, dotted print, ben day dots, vintage dotted print, dotted
        magazine print, dots, dot pattern, newsprint, newspaper, newspaper photo, printed dots, halftone dots,
        lichtenstein dots, screen tone, halftone screen, magazine print, polka dots, raster dots, dot matrix,
        dotted, cmyk dots, print with coarse dots, stippled, stippling, black dots, black and white dots, dots on
        paper, newspaper print, newspaper picture, newspaper portrait, daily news photo, printed in the newspaper,
        the morning paper, front page photo, dot screen, coarse dot screen, raster print, rasterised dots,
        halftoned, half tone, ink dots, dots of different size, big black dots, dotted portrait, press photo,
        printed press, manga screentone, screentone, dot art, dotwork, black newsprint dots, tabloid photo, wall
        street journal portrait, pages of a newspaper""",
        """dotted newspaper print, halftone poster, big printed dots, a face made of dots, printed in a daily paper,
        coarse raster of dots""",
    ),
    _style(
        "mosaic",
        "Mosaic",
        "mosaic of coloured tiles",
        """mosaic, mosaic tiles, ceramic tile mosaic, roman mosaic, tiles, square tiles, bathroom tiles, byzantine
        mosaic, mosaic art, tiled, tesserae, tiled wall, small coloured tiles, coloured tiles, little tiles, glass
        tiles, golden byzantine mosaic, gold mosaic, ravenna, pompeii, pompeii mosaic, pebble mosaic, stone
        mosaic, church mosaic, mosaic floor, gaudi, gaudi tiles, broken tiles, trencadis, pool tiles, swimming
        pool tiles, ceramic tiles, tile art, tile mosaic portrait, made of tiles, grout lines, metro station
        tiles, subway tiles, islamic tiles, moroccan tiles, azulejo, portuguese tiles, hagia sophia mosaic,
        ancient roman floor, fountain mosaic, tessellated, kitchen tiles, mosaic portrait, marble chips set in
        mortar, glass mosaic, small stones set in cement, tile wall, byzantine icon""",
        """tile mosaic, a roman tile floor, made of tiny tiles, byzantine tile portrait, broken ceramic pieces, set
        in coloured tesserae""",
    ),
    _style(
        "stainedglass",
        "Stained glass",
        "stained glass window",
        """stained glass, stained-glass, church window, church glass, coloured glass, leaded glass, lead lines and
        coloured glass, glass window, glass panes, gothic window, gothic church, gothic rose window, rose window,
        tiffany glass, tiffany lamp, tiffany, leadlight, lead came, glass art, window of a church, coloured panes
        of glass, glowing coloured glass, sunlight through coloured glass, notre dame window, chartres, sainte
        chapelle, chagall window, chapel window, religious window, saint in a window, stained glass art, stained
        glass portrait, stained glass panel, leaded window, painted glass, glass painting, glass pieces,
        translucent glass, art nouveau glass, window pane art, medieval window, medieval glass, abbey window,
        coloured windows, panes, glass mosaic window, frosted coloured glass, backlit glass, kaleidoscope of
        glass, holy window, cathedral glass, cathedral""",
        """a stained glass saint, church window glass, panes of coloured glass, gothic stained window, lead and glass
        picture, tiffany window""",
    ),
    _style(
        "lowpoly",
        "Low poly",
        "low poly triangles",
        """low poly, low-poly, lowpoly, polygons, polygon, polygon art, polygonal, triangles, triangle, triangulated,
        geometric, geometric shapes, geometric facets, facets, faceted, origami, paper folding, folded paper,
        crystal facets, low polygon model, 3d low poly, playstation 1 graphics, ps1 graphics, early 3d game, old
        3d graphics, delaunay triangulation, mesh of triangles, triangle mesh, flat shaded polygons, angular,
        angular shapes, cubism, cubist, picasso, cubist portrait, abstract geometry, geometric portrait, geometric
        art, diamond facets, crystals, gem facets, polygon mesh, virtua fighter, tomb raider 1996, paper craft,
        papercraft, low poly 3d model, low poly portrait, flat polygons, prism, shards, abstract triangles,
        angular facets, braque""",
        """polygon portrait, made of triangles, low polygon style, geometric triangle art, faceted like a gem, an
        origami figure""",
    ),
    _style(
        "clay",
        "Clay",
        "claymation figure",
        """clay, claymation, clay figure, clay model, modelling clay, plasticine, plasticine figure, play doh,
        play-doh, playdough, stop motion, stop motion clay, stop motion film, stop motion animation, aardman,
        chicken run, shaun the sheep, gumby, coraline, tim burton puppet, puppet, clay puppet, soft clay, clay
        sculpture, clay animation, sculpted in clay, made of clay, moulded clay, polymer clay, fimo, dough, dough
        figure, soft toy figure, toy figure, rubber figure, vinyl toy, plastic figure, action figure, pottery,
        ceramic figure, terracotta, modelled by hand, thumbprints in clay, squishy, wax figure, marzipan figure,
        clay character, putty, rounded clay shapes, claylike, 3d clay render, nick park""",
        """a clay person, modelled in plasticine, claymation movie, play doh model of me, stop motion puppet, made
        from modelling clay""",
    ),
    _style(
        "chalk",
        "Chalk",
        "chalk on a blackboard",
        """chalk, chalkboard, chalk drawing, blackboard, black board, white chalk, chalk lines, chalk art, chalk
        board drawing, drawn in chalk, chalk sketch, blackboard drawing, chalkboard menu, cafe chalkboard,
        classroom blackboard, classroom board, school board, slate, slate board, chalk on slate, chalk dust, dusty
        chalk, teacher's drawing, maths teacher's board, white chalk on black, white lines on black, white on
        black drawing, chalk stick, coloured chalk, sidewalk chalk, pavement chalk, street chalk, pavement art,
        pavement drawing, hopscotch chalk, green board, green chalkboard, chalk pastels, chalk pastel, chalk
        lettering, chalk portrait, chalked, chalky lines, white crayon on black paper, white pencil on black
        paper, physics blackboard, lecture hall blackboard, restaurant menu board, chalkboard art, chalk strokes,
        tailor's chalk, chalk outline""",
        """white chalk drawing, a chalkboard sketch, sketched in chalk, on the classroom board, chalk on pavement,
        drawn on slate""",
    ),
    _style(
        "marble",
        "Marble",
        "white marble statue",
        """marble, marble statue, statue, statues, sculpture, white marble, marble sculpture, carved in marble, stone
        statue, stone sculpture, carved stone, carved, stone, michelangelo statue, michelangelo, david by
        michelangelo, statue of david, greek statue, greek god statue, greek sculpture, roman statue, roman bust,
        bust, marble bust, bernini, rodin, canova, venus de milo, classical sculpture, antique statue, ancient
        statue, ancient greece, plaster, plaster cast, plaster bust, alabaster, white stone, polished stone,
        carrara marble, granite, bas relief, relief carving, turned to stone, medusa, petrified, monument,
        sculpted, stone carving, sculptor, porcelain, elgin marbles, parthenon, pietà, ivory carving, apollo,
        gypsum""",
        """a marble bust, carved from stone, roman marble sculpture, a statue of me, classical greek bust, chiselled
        out of white stone""",
    ),
    _style(
        "vhs",
        "VHS",
        "vhs tape recording",
        """vhs, vhs tape, video tape, videotape, video cassette, cassette, vcr, vhs glitch, vhs effect, glitch,
        glitch art, glitchy, tracking lines, tape noise, tape distortion, analog video, analogue video, analog tv,
        analogue television, old tv, old television, television, tv static, static, bad reception, crt, old crt,
        crt tv, crt screen, crt scan lines, scan lines, scanlines, camcorder, 80s camcorder, 80s video, 1980s
        video, eighties video, 90s video, 1990s home video, home video, betamax, worn tape, found footage, rewind,
        retro tv, retro video, chromatic aberration, rgb shift, colour bleed, mtv 1985, noisy signal, broken
        signal, analog glitch, interlaced video, tube television, old video recording""",
        """a vhs recording, eighties camcorder tape, old video cassette, glitchy tape, television static, worn vcr
        recording""",
    ),
    _style(
        "embroidery",
        "Embroidery",
        "embroidery stitches",
        """embroidery, embroidered, stitches, stitched, stitch, cross stitch, cross-stitch, needlepoint, needlework,
        sewing, sewn, sewn fabric, thread, threads, coloured thread, yarn, wool, knitted, knitting, knit sweater,
        knitted wool, crochet, crocheted, tapestry, woven, weaving, woven tapestry, bayeux tapestry, fabric,
        textile, textile art, cloth, quilt, quilted, patchwork, felt, felted wool, silk thread, satin stitch, hoop
        embroidery, embroidery hoop, embroidered patch, stitched with thread, needle and thread, ugly christmas
        sweater, wool jumper, macrame, carpet, persian rug, rug, lace, linen sampler, handicraft, gobelin,
        beadwork""",
        """a stitched portrait, cross stitched picture, embroidered on linen, made of thread, knitted from yarn, a
        woven wall hanging""",
    ),
    _style(
        "impressionist",
        "Impressionist",
        "impressionist painting by monet",
        """impressionism, impressionist, impressionist painting, impressionistic, monet, claude monet, manet, renoir,
        cezanne, degas, pissarro, sisley, berthe morisot, mary cassatt, water lilies, waterlilies, giverny,
        monet's garden, impression sunrise, dabs of paint, dabs of colour, short brush strokes, broken colour,
        dappled light, dappled sunlight, painted outdoors, plein air, plein air painting, french painting, french
        impressionist, ballet dancers by degas, light and colour in dabs, pointillism, pointillist, seurat,
        signac, painted in dots of colour, soft brush strokes, garden painting, poppy field painting, haystacks,
        rouen cathedral by monet, bathers, luncheon of the boating party, parisian painting, belle epoque
        painting, hazy painted light, gauguin, gauguin tahiti, loose brushwork, feathery brush strokes, painted
        garden""",
        """a monet painting, in the manner of renoir, painted like monet's pond, short dabs of colour, impressionist
        portrait, degas dancers""",
    ),
)

# So plain that two of them in one prompt mean a mixture of two styles.
NAMES: dict[str, tuple[str, ...]] = {
    "photo": (),
    "watercolor": ("watercolor", "water color", "aquarelle", "gouache"),
    "comic": ("comic", "comics", "comic book", "cartoon", "cel shaded", "anime"),
    "pencil": ("pencil", "pencil sketch", "pencil drawing", "pencils", "graphite", "charcoal"),
    "ink": ("ink", "ink drawing", "black ink", "pen and ink", "linocut", "manga"),
    "neon": ("neon", "neon lights", "neon light", "neon sign", "cyberpunk", "tron", "synthwave", "vaporwave"),
    "riso": ("riso", "risograph", "riso print", "risograph print"),
    "pixel": ("pixel", "pixels", "pixel art", "pixelated", "8 bit", "minecraft", "lego", "voxel"),
    "ukiyo": ("ukiyo e", "ukiyo", "hokusai", "woodblock", "woodblock print", "japanese woodblock", "japanese print"),
    "thermal": ("thermal", "thermal camera", "thermal image", "infrared", "heat map", "heatmap", "heat vision"),
    "blueprint": ("blueprint", "blue print", "technical drawing", "cyanotype"),
    "popart": ("pop art", "warhol", "andy warhol", "lichtenstein", "roy lichtenstein"),
    "vintage": ("vintage", "sepia", "old film", "vintage film", "vintage photo", "silent film", "silent movie"),
    "nightvision": ("night vision", "nightvision", "night vision goggles"),
    "oil": ("oil", "oil painting", "oil paint", "oils", "rembrandt"),
    "starry": ("starry night", "van gogh", "vincent van gogh"),
    "halftone": ("halftone", "half tone", "halftone dots", "newspaper", "newsprint"),
    "mosaic": ("mosaic", "mosaics", "mosaic tiles"),
    "stainedglass": ("stained glass", "stained glass window"),
    "lowpoly": ("low poly", "lowpoly", "polygons", "origami"),
    "clay": ("clay", "claymation", "plasticine", "play doh"),
    "chalk": ("chalk", "chalkboard", "blackboard"),
    "marble": ("marble", "statue", "marble statue", "marble sculpture"),
    "vhs": ("vhs", "vhs tape", "video tape"),
    "embroidery": ("embroidery", "embroidered", "cross stitch", "tapestry", "knitted", "crochet"),
    "impressionist": ("impressionist", "impressionism", "monet", "claude monet", "renoir"),
}

BY_ID = {style.id: style for style in STYLES}


def read_lexicon(path: Path) -> dict[str, tuple[str, ...]]:
    """Further phrases by style, from blocks of "[style]" and phrases parted by commas and lines."""
    found: dict[str, tuple[str, ...]] = {}
    for block in path.read_text(encoding="utf-8").split("[")[1:]:
        style, _, text = block.partition("]")
        found[style] = tuple(phrase for part in text.replace("\n", ",").split(",") if (phrase := part.strip()))
    return found


LEXICON = read_lexicon(Path(__file__).with_name("lexicon.txt"))

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


def in_template(text: str, rng: np.random.Generator) -> str:
    """A phrase as people wrap it, sometimes after a subject."""
    text = str(rng.choice(_TEMPLATES)).format(text)
    subject = str(rng.choice(_SUBJECTS))
    return f"{subject}, {text}" if subject else text


def random_prompt(style: Style, rng: np.random.Generator, *, held_out: bool = False) -> str:
    """A prompt for a style: a phrase in a template, sometimes with a subject; one photo in five has none at all."""
    if style.id == "photo" and not held_out and rng.random() < 0.4:
        return "" if rng.random() < 0.75 else str(rng.choice(_SUBJECTS[4:]))
    phrases: Sequence[str] = style.held_out if held_out else style.phrases
    template = "{}" if held_out or rng.random() < 0.3 else str(rng.choice(_TEMPLATES))
    text = template.format(phrases[int(rng.integers(len(phrases)))])
    subject = "" if held_out else str(rng.choice(_SUBJECTS))
    return f"{subject}, {text}" if subject else text
