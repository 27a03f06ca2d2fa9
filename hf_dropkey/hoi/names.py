"""Names of the classes and verbs of the public data sets, in the order of their numbers.

COCO's categories have gaps in their numbers. HICO-DET's verbs are those of the HICO list (1 to 117 in its files), V-COCO's
the 29 of QPIC's conversion (0 to 28), an action with the role of its object.
"""

COCO_OBJECTS = {
    1: "person",
    2: "bicycle",
    3: "car",
    4: "motorcycle",
    5: "airplane",
    6: "bus",
    7: "train",
    8: "truck",
    9: "boat",
    10: "traffic light",
    11: "fire hydrant",
    13: "stop sign",
    14: "parking meter",
    15: "bench",
    16: "bird",
    17: "cat",
    18: "dog",
    19: "horse",
    20: "sheep",
    21: "cow",
    22: "elephant",
    23: "bear",
    24: "zebra",
    25: "giraffe",
    27: "backpack",
    28: "umbrella",
    31: "handbag",
    32: "tie",
    33: "suitcase",
    34: "frisbee",
    35: "skis",
    36: "snowboard",
    37: "sports ball",
    38: "kite",
    39: "baseball bat",
    40: "baseball glove",
    41: "skateboard",
    42: "surfboard",
    43: "tennis racket",
    44: "bottle",
    46: "wine glass",
    47: "cup",
    48: "fork",
    49: "knife",
    50: "spoon",
    51: "bowl",
    52: "banana",
    53: "apple",
    54: "sandwich",
    55: "orange",
    56: "broccoli",
    57: "carrot",
    58: "hot dog",
    59: "pizza",
    60: "donut",
    61: "cake",
    62: "chair",
    63: "couch",
    64: "potted plant",
    65: "bed",
    67: "dining table",
    70: "toilet",
    72: "tv",
    73: "laptop",
    74: "mouse",
    75: "remote",
    76: "keyboard",
    77: "cell phone",
    78: "microwave",
    79: "oven",
    80: "toaster",
    81: "sink",
    82: "refrigerator",
    84: "book",
    85: "clock",
    86: "vase",
    87: "scissors",
    88: "teddy bear",
    89: "hair drier",
    90: "toothbrush",
}

HICO_VERBS = tuple(
    """
    adjust assemble block blow board break brush_with buy carry catch chase check clean control cook cut cut_with
    direct drag dribble drink_with drive dry eat eat_at exit feed fill flip flush fly greet grind groom herd hit
    hold hop_on hose hug hunt inspect install jump kick kiss lasso launch lick lie_on lift light load lose make
    milk move no_interaction open operate pack paint park pay peel pet pick pick_up point pour pull push race read
    release repair ride row run sail scratch serve set shear sign sip sit_at sit_on slide smell spin squeeze stab
    stand_on stand_under stick stir stop_at straddle swing tag talk_on teach text_on throw tie toast train turn
    type_on walk wash watch wave wear wield zip
    """.split()  # noqa: SIM905  # a list literal would take a line for each verb
)

VCOCO_VERBS = tuple(
    """
    hold_obj stand sit_instr ride_instr walk look_obj hit_instr hit_obj eat_obj eat_instr jump_instr lay_instr
    talk_on_phone_instr carry_obj throw_obj catch_obj cut_instr cut_obj run work_on_computer_instr ski_instr
    surf_instr skateboard_instr smile drink_instr kick_obj point_instr read_obj snowboard_instr
    """.split()  # noqa: SIM905  # a list literal would take a line for each verb
)
# without the actions that have no object, and point, whose number of test images is too small; papers report these 24
VCOCO_ROLE_VERBS = tuple(verb for verb in VCOCO_VERBS if verb not in ("stand", "walk", "run", "smile", "point_instr"))
MISSING_OBJECT = "missing object"


def plain_name(name: str) -> str:
    """A class name in the form by which those of different data sets compare: "Dining_Table" is "dining table"."""
    return " ".join(name.replace("_", " ").lower().split())
