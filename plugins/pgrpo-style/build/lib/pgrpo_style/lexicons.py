"""The styles and the genres that are known by name: what to count, and which words are whose.

The words are this package's own choice. They hold those of pgrpo's data set `personas`, so its small
language can be scored too, but not the hints in its prompts, or repeating a prompt would be worth
something. A config replaces or adds to them.
"""

from collections.abc import Mapping

from .measures import Measure

STYLE_WORDS: Mapping[str, str] = {
    "formal": """
        therefore moreover regarding sincerely hence accordingly respectfully furthermore consequently
        nevertheless thus whom shall upon hereby notwithstanding whereas concerning henceforth
        additionally likewise albeit esteemed cordially distinguished gratitude pleasure appreciate
        """,
    "slang": """
        dope lit vibes vibe chill bruh lowkey sick banger gonna wanna dude bro fam
        highkey yeah nah cuz kinda sorta ain't y'all legit hella homie lol omg epic crazy insane
        """,
    "poetic": """
        moonlit silver sorrow river tender ember dawn yearning moon shadow twilight
        velvet sky soul tear star dusk wandering breeze petal eternal silence golden rain bloom
        moonlight starlight sigh drift gentle
        """,
    "dry": """
        exactly merely roughly average standard adequate measured plain approximately sufficient
        typical ordinary basic regular normal consists contains includes simply acceptable
        reasonable moderate functional respectively per usual
        """,
}

WANTS: Mapping[str, Mapping[Measure, tuple[float, float]]] = {
    "formal": {
        "markers": (0.0, 0.08),
        "foreign_markers": (0.08, 0.0),
        "contractions": (0.06, 0.0),
        "exclamations": (0.5, 0.0),
        "letters_per_word": (3.8, 5.0),
        "words_per_sentence": (5.0, 14.0),
    },
    "slang": {
        "markers": (0.0, 0.12),
        "foreign_markers": (0.08, 0.0),
        "contractions": (0.0, 0.08),
        "grade": (9.0, 3.0),
        "exclamations": (0.0, 0.5),
    },
    "poetic": {
        "markers": (0.0, 0.15),
        "foreign_markers": (0.08, 0.0),
        "contractions": (0.06, 0.0),
        "words_per_line": (16.0, 7.0),
        "type_token_ratio": (0.6, 0.9),
    },
    "dry": {
        "markers": (0.0, 0.1),
        "foreign_markers": (0.08, 0.0),
        "exclamations": (0.3, 0.0),
        "punctuation": (0.3, 0.1),
        "words_per_sentence": (18.0, 9.0),
    },
}
"""Where each measure of a style is worth 0 and where 1, for texts of some twenty words."""

GENRE_WORDS: Mapping[str, str] = {
    "jazz": """
        swing saxophone brushes bebop trumpet improvised ballad walking jazz sax bop trombone clarinet
        improvisation improvise swinging quintet syncopated syncopation scat ragtime
        bluesy smoky crooner
        """,
    "metal": """
        riff distortion growl thunder shred blast doom heavy metal headbang headbanging thrash
        scream brutal distorted shredding growling thunderous fury hellfire
        """,
    "folk": """
        banjo fiddle acoustic harvest meadow strum campfire harmony folk mandolin harmonica accordion
        strumming hearth countryside lullaby shanty dulcimer
        """,
    "techno": """
        synth bassline strobe warehouse loop kick pulse modular techno synthesizer
        bpm electronic sequencer dancefloor pulsing pounding looping hypnotic
        """,
    "classical": """
        classical orchestra orchestral symphony violin cello sonata concerto conductor allegro adagio
        opera baroque prelude fugue overture philharmonic viola oboe nocturne string bassoon
        """,
    "hiphop": """
        hiphop hip-hop rap rapper rapping rhyme mc cypher freestyle turntable beatbox boombap
        breakbeat emcee rhyming spit verse trap
        """,
}
