"""Plots about giving, sharing, helping and making up."""

from __future__ import annotations

from examples.demo_model.corpus.stories.plot import Plot

QUARREL = Plot(
    "quarrel",
    (
        ("{h}'s best friend was {f.full}.", "{h} had a good friend, {f.intro}.", "{h} and {f.full} did everything together."),
        (
            "{when} they found {t.a} {p.at}.",
            "{when}, {p.at}, both of them saw {t.a} at the same moment.",
            "{when} {o.a} gave them {t.a}, one for the two of them.",
        ),
        (
            '"It is mine!" cried {h}. "No, it is mine!" cried {f}.',
            '"I saw the {t} first," said {h}. "No, I did," said {f}.',
            "Both wanted the {t}, and neither would let go.",
        ),
        (
            "They pulled and shouted until both were red in the face.",
            "{h} pulled on one side, and {f} on the other.",
            "They shouted so loudly that the birds flew away.",
        ),
        (
            "Then the {t} fell {p.spot}, out of reach.",
            "In the end the {t} flew through the air and landed {p.spot}.",
            "The {t} slipped away and rolled {p.spot}.",
        ),
        (
            "{h} tried to reach it, but {h.his} arms were too short.",
            "Neither of them could get it alone.",
            "{f} tried first, then {h}. It was no use.",
        ),
        (
            '"If you hold me, I can get it," said {f}.',
            '"Climb on my back," said {h}.',
            '"Let us try together," said {h} quietly.',
        ),
        (
            "And so, together, they got the {t} back.",
            "{h} held {f} tight, and a moment later they had the {t}.",
            "It worked at once.",
        ),
        (
            "They looked at each other and began to laugh.",
            '"I am sorry," said {h}. "I am sorry too," said {f}.',
            '"What a silly quarrel!" said {f}.',
        ),
        (
            "From then on {h} had the {t} in the morning and {f} in the afternoon.",
            "They agreed to share the {t}: one day for {h}, one day for {f}.",
            '"It is ours," said {h}, and that was the end of the quarrel.',
        ),
    ),
    (
        (
            "{h.full} and {f.full} both wanted the same {t}. It fell {p.spot}, and only together could they get it back. "
            "After that they shared it."
        ),
        "Two friends, {h.full} and {f.full}, quarrelled about {t.a}. In the end they laughed and took turns.",
    ),
    ("sharing is better than winning", "a friend is worth more than a thing", "it takes two to end a quarrel"),
    fits=("light", "music", "paper", "toy", "clothes", "treasure", "food", "magic"),
)

GIFT = Plot(
    "gift",
    (
        (
            "{h}'s friend {f.full} had a birthday soon.",
            "In {days} days it was the birthday of {f.full}, {h}'s best friend.",
            "{h} wanted to make {f.full} a present.",
        ),
        (
            '"What would {f} like best?" wondered {h}.',
            "{h} knew what {f} wished for: {t.one}.",
            "For a long time {f} had wanted {t.one}.",
        ),
        (
            "But {h} had no money.",
            "But {h}'s purse was empty.",
            "There was only one trouble: {t.one} costs money, and {h} had none.",
        ),
        (
            "So {h} went to {o.a} and asked for advice.",
            '{h} asked {o.a}. "Can you tell me what to do?"',
            "On {h.his} way {p.to} {h.he} met {o.a}.",
        ),
        (
            '"The best presents are made by hand," said {o}.',
            '"I have an old one," said {o}. "If you help me for a day, it is yours."',
            '"Work for me until evening," said {o}, "and you shall have {t.one}."',
        ),
        (
            "{h} worked all day {p.at} and did not rest once.",
            "All day {h} worked hard, and in the evening {h.he} held {t.a} in {h.his} hands.",
            "{h} swept and carried and cleaned until the sun went down.",
        ),
        (
            "{h.he} wrapped the {t} in a cloth and tied a bow.",
            "At home {h.he} wrapped it in paper and wrote {f}'s name on it.",
            "{h.ref} could hardly sleep that night.",
        ),
        (
            "On the birthday {f} opened the present.",
            'The next morning {h} knocked at {f}\'s door. "Happy birthday!" said {h}.',
            "Then the great day came.",
        ),
        (
            '"{t.one}!" cried {f}. "How did you know?"',
            "When {f} saw the {t}, {f.he} jumped for joy.",
            "{f} was so happy that {f.he} could not speak.",
        ),
        (
            '"You worked for it," said {f}, "and that makes it the best present of all."',
            "{f} hugged {h} for a long time.",
            "They ate cake until they could eat no more.",
        ),
    ),
    (
        (
            "{h.full} wanted to give {f.full} {t.one}, but had no money. {h.he} worked for {o.a} all day, and {f} was very "
            "happy with the present."
        ),
        "For {f.full}'s birthday, {h.full} earned {t.a} with {h.his} own hands. It was the best present of all.",
    ),
    ("the best present is the one you work for", "giving is as good as getting", "a present needs love more than money"),
    fits=("light", "music", "paper", "toy", "clothes", "vessel", "home", "treasure", "garden", "tool"),
)

WINTER = Plot(
    "winter",
    (
        (
            "It was the coldest winter for years.",
            "That year winter came early, and snow lay deep {p.at}.",
            "One winter the wind blew for {days} weeks, and the {p} was white.",
        ),
        (
            "{h} sat at home, and was glad of {h.his} {t}.",
            "{h} had {t.a}, and so {h.he} did not mind the cold.",
            "But {h} had {t.a}, and that was a comfort.",
        ),
        (
            "One evening there was a knock at the door.",
            "One night {h.he} heard a soft knock.",
            "One day {h} looked out and saw somebody in the snow.",
        ),
        (
            "Outside stood {o.a}, shaking with cold.",
            "It was {o.a}, tired and hungry.",
            'There stood {o.a}. "I have lost my way," said {o}.',
        ),
        (
            '"Come in," said {h}, and put another log on the fire.',
            '{h} did not think twice. "Please come in," {h.he} said.',
            '{h} opened the door wide. "Sit down by the fire," {h.he} said.',
        ),
        (
            "{h} gave {o} a place by the fire and half of {h.his} supper.",
            "They had a hot soup together and talked until midnight.",
            "{o} told {h} of faraway lands, and {h} listened with wide eyes.",
        ),
        ("In the morning {o} had to go on.", "When the storm was over, {o} wanted to leave.", "The next day the sky was clear."),
        (
            '{h} looked at {h.his} {t}. Then {h.he} gave it to {o}. "You need it more than I do," {h.he} said.',
            '"Take my {t}," said {h}. "The way is long."',
            "{h} thought for a while, and then {h.he} handed {o} the {t}.",
        ),
        ("", "It was hard to let it go, but {h} felt warm inside.", "{o} went away over the snow and turned back once to wave."),
        (
            'In spring a parcel came. In it were the {t} and a letter: "Thank you, my friend."',
            "When the snow had melted, {o} came back and brought the {t}, and seeds for a whole garden.",
            "In spring {o} returned with the {t} and a basket full of good things.",
        ),
    ),
    (
        (
            "In a cold winter {h.full} took in {o.a} and gave away {h.his} {t}. In spring {o} came back and brought it, "
            "with a present."
        ),
        (
            "{o.a} knocked at {h.full}'s door in the snow. {h} shared {h.his} supper and {h.his} {t}. In spring the "
            "kindness came back."
        ),
    ),
    ("kindness finds its way back", "a warm heart is the best fire", "those who share are never poor"),
    fits=("light", "clothes", "vessel", "music", "paper", "home"),
    traits=("kind", "lonely", "cheerful", "patient", "grumpy", "shy"),
)

NEWCOMER = Plot(
    "newcomer",
    (
        (
            "{when} somebody new moved in near the {p}: {f.intro}.",
            "{when} {f.intro} came to live near the {p}.",
            "{when} a cart stopped, and out climbed {f.intro}.",
        ),
        (
            "{f} knew nobody and stayed alone.",
            "Nobody spoke to {f}, because {f.he} was a stranger.",
            "The others only looked at {f} and whispered.",
        ),
        (
            "{h} saw {f.him} sitting alone {p.at}.",
            "From {h.his} window {h} could see {f}, who was always by {f.him}self.",
            "Every day {h} saw {f} walk {p.to} alone.",
        ),
        (
            '"It must be hard to have no friends," thought {h}.',
            '"I would be sad too," thought {h}.',
            "{h} did not know what to say to a stranger.",
        ),
        (
            "Then {h.he} had an idea and took {h.his} {t}.",
            "At home {h} had {t.a}. {h.he} picked it up and went over.",
            "Then {h} looked at {h.his} {t} and had an idea.",
        ),
        (
            '"Hello," said {h}. "I live next door. Would you like to see my {t}?"',
            '"I brought my {t}," said {h}. "Shall we share it?"',
            '{h} held out the {t}. "This is for both of us," {h.he} said.',
        ),
        (
            "{f} looked up, and for the first time {f.he} smiled.",
            '"Oh yes!" said {f}, and {f.his} eyes grew bright.',
            "{f} was shy at first, but soon {f.he} laughed.",
        ),
        (
            "They spent the whole afternoon {p.at}.",
            "They talked about this and that, and the hours flew by.",
            "{f} knew games that nobody near the {p} had ever heard of.",
        ),
        (
            "The next day two others came, and then three more.",
            "Soon the others came to see why they were laughing, and joined them.",
            "When the others saw how nice {f} was, they were sorry that they had waited.",
        ),
        (
            '"Thank you for coming over," said {f} in the evening.',
            '"Yesterday I wanted to go back," said {f}. "Now I want to stay."',
            '"You were my first friend here," said {f}.',
        ),
    ),
    (
        "{f.full} was new near the {p} and had no friends. {h.full} came over with {t.a}, and soon everybody played together.",
        "{h.full} saw that {f.full} was alone. {h.he} shared {h.his} {t} with {f.him}, and they became friends.",
    ),
    ("a hello can change a whole day", "a stranger is a friend you do not know yet", "it takes only one friend to feel at home"),
    fits=("toy", "food", "music", "paper", "vehicle", "light"),
)

LIE = Plot(
    "lie",
    (
        (
            "Next door lived {o.a} who had {t.a}.",
            "{h} often visited {o.a}, who owned {t.a}.",
            "{h} helped {o.a} in the house, and on the table there stood {t.a}.",
        ),
        (
            '"You may look at it," said {o}, "but please do not touch it."',
            "{o} loved the {t} more than anything.",
            "{o} had been given the {t} long ago by a friend.",
        ),
        ("{when} {h} was alone with it.", "{when} {o} went out for a while.", "{when} nobody was there but {h}."),
        (
            "{h} took the {t} in {h.his} hands, and it slipped and broke.",
            '"Only for a moment," said {h}, and then the {t} fell to the floor and broke.',
            "{h} wanted to hold it just once. Crack! The {t} was broken.",
        ),
        (
            "{h.he} was so frightened that {h.he} hid the pieces {p.spot}, {p.at}.",
            "Quickly {h} carried the pieces {p.to} and hid them {p.spot}.",
            "{h} ran {p.to} and put the pieces {p.spot}.",
        ),
        (
            '"Have you seen my {t}?" asked {o} in the evening. "No," said {h}.',
            '"My {t} is gone," said {o} sadly. {h} said nothing.',
            "When {o} asked, {h} only shook {h.his} head.",
        ),
        (
            "That night {h} could not sleep.",
            "But {h}'s supper tasted of nothing, and {h.his} stomach hurt.",
            "All night long {h} lay awake and thought of {o}'s sad face.",
        ),
        (
            "In the morning {h.he} fetched the pieces and went to {o}.",
            "Before the sun was up, {h} stood at {o}'s door with the pieces.",
            "At last {h} could bear it no more and went to {o}.",
        ),
        (
            '"I broke it, and I lied," said {h}. "I am very sorry."',
            "{h} told the whole truth, and tears ran down {h.his} face.",
            '"It was me," said {h} in a small voice.',
        ),
        (
            '{o} was silent for a while. "It was brave to tell me," {o.he} said.',
            '"{t.one} can be mended," said {o}, "and so can this."',
            '{o} sighed, and then {o.he} put a hand on {h}\'s shoulder. "Thank you for the truth," {o.he} said.',
        ),
        (
            "Together they glued the pieces, one by one.",
            "They mended the {t} together, and it took the whole day.",
            "{h} and {o} sat down and mended what could be mended.",
        ),
    ),
    (
        (
            "{h.full} broke the {t} of {o.a} and hid the pieces {p.spot}. {h.he} could not sleep until {h.he} told the "
            "truth. Then they mended it together."
        ),
        "{h.full} broke {t.a} and lied about it. The next day {h.he} told {o.a} the truth, and was forgiven.",
    ),
    ("the truth makes the heart light", "telling the truth is brave", "a lie is heavier than a stone"),
    fits=(
        "cup",
        "bottle",
        "teapot",
        "jug",
        "bowl",
        "vase",
        "mug",
        "violin",
        "guitar",
        "fiddle",
        "flute",
        "lamp",
        "lantern",
        "clock",
        "chair",
        "mirror",
        "statue",
        "crystal",
        "toy boat",
        "doll",
        "puppet",
        "wooden horse",
        "spyglass",
        "music box",
        "umbrella",
    ),
    joy=False,
)

PLOTS = (QUARREL, GIFT, WINTER, NEWCOMER, LIE)
