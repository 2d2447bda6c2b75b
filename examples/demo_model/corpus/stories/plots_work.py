"""Plots about work and learning: what grows, what is mended, what is earned."""

from __future__ import annotations

from examples.demo_model.corpus.stories.plot import Plot

MEND = Plot(
    "mend",
    (
        (
            "{h} had {t.a}, and {h.he} used it every day.",
            "{h}'s greatest treasure was {t.a}.",
            "{h} had got {t.a} from {h.his} father.",
        ),
        (
            "{when} it fell down and broke.",
            "{when} there was a crack, and the {t} was broken.",
            "{when} {h} tripped {p.at}, and the {t} broke in two.",
        ),
        (
            '"I will mend it myself," said {h}, and took a hammer.',
            "{h} tried to mend it with string, but it fell apart again.",
            "First {h} tried glue, and then nails. It only became worse.",
        ),
        (
            "",
            "{h} was so angry that {h.he} stamped on the floor.",
            "{h.he} sat before the pieces and did not know what to do.",
            '"It is no use," said {h}.',
        ),
        (
            "Then {h} remembered {o.a} who lived {p.at}.",
            'A neighbour said, "Go {p.to}. {o.a} lives there and can mend everything."',
            "{h} put the pieces into a bag and went to {o.a} who lived {p.at}.",
        ),
        ('"Can you mend my {t}?" asked {h}.', "{o} looked at the {t} for a long time.", "{h} showed {o} the pieces."),
        (
            '"No," said {o}, "but I can show you how to do it."',
            '"Sit down," said {o}. "We will do it together, slowly."',
            '"Your hands can do it," said {o}. "They only have to learn."',
        ),
        (
            "{o} showed {h.him} how to clean the pieces and how to fit them together.",
            "All afternoon they worked side by side.",
            'The first try failed, and so did the second. "Once more," said {o} every time.',
        ),
        (
            "When the sun went down, the {t} was whole again.",
            "At last the {t} was as good as new.",
            "And then the last piece found its place.",
        ),
        (
            '"I did it!" cried {h}.',
            "{h} looked at {h.his} own hands and could not believe it.",
            '"You see," said {o}, "all you needed was time."',
        ),
        (
            "After that {h} mended the things of all the neighbours.",
            "Now everybody near the {p} came to {h} when something broke.",
            "The next week {h} mended a chair, a toy and a gate.",
        ),
    ),
    (
        "The {t} of {h.full} broke. {o.a} who lived {p.at} showed {h.him} how to mend it, and in the evening it was whole again.",
        "{h.full} broke {h.his} {t} and could not mend it. {o.a} taught {h.him} patience, and so it worked.",
    ),
    ("good work takes time", "what is broken can be mended", "one can learn almost anything"),
    fits=(
        "drum",
        "violin",
        "guitar",
        "fiddle",
        "kite",
        "puppet",
        "toy boat",
        "toy train",
        "wooden horse",
        "clock",
        "chair",
        "stool",
        "cart",
        "sled",
        "wagon",
        "bicycle",
        "ladder",
        "lantern",
        "lamp",
        "teapot",
        "jug",
        "vase",
        "bowl",
        "umbrella",
        "toy car",
        "telescope",
        "camera",
        "harp",
        "doll",
    ),
)

LEARN = Plot(
    "learn",
    (
        (
            "{when} {h} heard {o.a} play {t.one} {p.at}.",
            "{when}, {p.at}, {o.a} was playing {t.one}.",
            "{h} had found {t.a} in a trunk, but {h.he} did not know how to play it.",
        ),
        (
            '"I want to play like that," said {h}.',
            "{h} had never heard anything so beautiful.",
            '"If only I could play the {t}!" sighed {h}.',
        ),
        (
            "When {h.he} tried for the first time, it sounded like a cat with a cold.",
            "The first sound was so terrible that the birds flew away.",
            "{h} tried, and only a squeak came out.",
        ),
        (
            "Everybody laughed, and {h} ran away.",
            '"Please stop!" called the neighbours.',
            '"You will never learn it," said the others.',
        ),
        ('"How did you learn it?" {h} asked {o.a}.', "Sadly {h} went to {o.a}.", "Only {o.a} did not laugh."),
        (
            '"A little every day," said {o}. "That is the whole secret."',
            '"I too was bad at first," said {o}. "Play every day, even when it is hard."',
            '"Start with one note," said {o}, "and when it is good, take the next."',
        ),
        (
            "So {h} practised {p.spot}, where nobody could hear {h.him}.",
            "Every day {h} went {p.to} and practised.",
            "{h} practised in the morning, at noon and in the evening.",
        ),
        (
            "After a week {h.he} could play one note, after a month a whole song.",
            "Spring came and went, and the squeaks became notes, and the notes became songs.",
            "Sometimes {h.he} wanted to give up, but {h.he} did not.",
        ),
        (
            "In autumn there was a feast {p.at}, and the musicians did not come.",
            "Then came the great feast, and the music was missing.",
            "On the night of the feast everybody was sad, for nobody could play.",
        ),
        ("{h} stood up and took the {t}.", '"May I try?" asked {h}.', "{h} stepped forward with the {t} and shaking knees."),
        (
            "At the first notes all were silent, and then they began to dance.",
            "{h.he} played, and it was so beautiful that nobody moved.",
            "{h.he} played until midnight, and everyone clapped.",
        ),
    ),
    (
        (
            "{h.full} wanted to play the {t}, but at first it sounded terrible. {o.a} told {h.him} to play a little every "
            "day. At the feast {h} played, and all danced."
        ),
        "{h.full} practised the {t} {p.at} every day. In autumn {h.he} played at the feast, and everyone clapped.",
    ),
    ("a little every day becomes a lot", "nobody is good at the beginning", "practice is the whole secret"),
    fits=("music",),
    joy=False,
)

GROW = Plot(
    "grow",
    (
        ("{when} {o.a} gave {h} {t.a}.", "{when} {h} found {t.a} {p.spot}.", "For {h.his} birthday {h} was given {t.a}."),
        (
            '"What shall I do with it?" asked {h}. "Give it water, and wait," said {o.a}.',
            "{h} planted it {p.at}, where the sun was warm.",
            "{h} dug a small hole {p.at} and put the {t} into the earth.",
        ),
        (
            "The next day {h} looked. Nothing had happened.",
            "Every morning {h} ran to look, and every morning it looked the same.",
            '"Why does it not grow?" {h} asked after an hour.',
        ),
        (
            '{f.full} came by and laughed. "Nothing will ever grow there," {f.he} said.',
            '"You are wasting your time," said {f.full}.',
            '{f.full} shook {f.his} head. "It is much too dry here," {f.he} said.',
        ),
        (
            "But {h} carried water every day.",
            "{h} pulled out the weeds and kept the snails away.",
            "{h} sang to it and gave it water, day after day.",
        ),
        (
            "Then there was a week without rain, and {h} walked {p.to} three times a day.",
            "One night there was frost, and {h} covered it with {h.his} own blanket.",
            "Once a storm bent it to the ground, and {h} tied it to a stick.",
        ),
        ("Weeks passed.", "Spring became summer.", "Slowly, very slowly, the days grew longer."),
        (
            "And one morning there was a new green leaf!",
            "Then, one morning, the first bud opened.",
            "And one day it was as tall as {h}, and full of blossoms.",
        ),
        (
            "Bees came, and birds, and everybody near the {p} wanted to see the {t}.",
            "It smelled so sweet that people stopped on the road.",
            '"I have never seen one so beautiful," said {o.a}.',
        ),
        (
            '{f} came too. "I was wrong," {f.he} said.',
            '"Will you show me how you did it?" asked {f}.',
            '{h} gave {f} a cutting of it. "Now you can have one too," {h.he} said.',
        ),
    ),
    (
        (
            "{h.full} planted {t.a} {p.at} and watered it every day, although {f.full} laughed. In summer it was the most "
            "beautiful one of all."
        ),
        "{h.full} took care of {t.a} for many weeks. One morning it blossomed, and even {f.full} was amazed.",
    ),
    ("good things need time", "patience makes things grow", "love and water work wonders"),
    fits=("garden",),
)

FEAST = Plot(
    "feast",
    (
        (
            "{when} {h} had {t.a} and wanted to eat it alone.",
            "{when} {h} made {t.a}, the best of the year.",
            "{when} {h} came home from the market with {t.a}.",
        ),
        (
            '"I will eat it {p.at}, where nobody sees me," thought {h}.',
            "{h} took it {p.to} and sat down {p.spot}.",
            "{h.he} carried it {p.to} to eat it in peace.",
        ),
        (
            'Just then {f.intro} came along. "That smells good," said {f}.',
            "But there was {f.intro}, looking at the {t} with big eyes.",
            'There sat {f.full}. "I have not eaten since yesterday," said {f}.',
        ),
        (
            '{h} thought for a moment. "Sit down," {h.he} said. "There is enough for two."',
            "{h} did not want to share at first, but {f} looked so hungry.",
            '"Well," said {h}, "half of it is still a lot."',
        ),
        (
            "Then {o.a} came by, and {o} was hungry too.",
            "Before they could begin, {o.a} stopped beside them.",
            "A moment later {o.a} sat down next to them.",
        ),
        (
            '"I have some bread," said {o}.',
            "{o} had a piece of cheese in {o.his} pocket.",
            '"Let me give you these nuts for it," said {o}.',
        ),
        (
            '"And I have apples!" called {f}, and ran to fetch them.',
            "{f} remembered that there was a jar of jam at home.",
            '"I can bring some milk," said {f}.',
        ),
        (
            "Soon one neighbour after the other came, and each brought something.",
            "More and more came, with plates and cups and songs.",
            "In the end there were twelve of them {p.at}.",
        ),
        (
            "The {t} was small, but the feast was large.",
            "There was only a small piece of the {t} for each, but nobody was hungry.",
            "They laid everything on one big cloth, with the {t} in the middle.",
        ),
        (
            '"This is better than eating alone," said {h}.',
            "{h} had never had such a merry meal.",
            "They ate and sang until the moon stood above the {p}.",
        ),
    ),
    (
        "{h.full} wanted to eat {t.a} alone. {f.full} came, and then {o.a}, and each brought something, and it became a feast.",
        "{h.full} shared {h.his} {t} with {f.full} {p.at}. In the end everybody brought something, and nobody stayed hungry.",
    ),
    (
        "food tastes best when it is shared",
        "half of a good thing with a friend is more than the whole alone",
        "sharing makes little into much",
    ),
    fits=("food",),
    joy=False,
)

SAVING = Plot(
    "saving",
    (
        (
            "In a shop window {p.at} {h} saw {t.a}.",
            "{when} {h} passed a shop {p.at}, and in the window there was {t.a}.",
            "{h} wished for one thing only: {t.a} that stood in a shop {p.at}.",
        ),
        (
            '"How much is the {t}?" asked {h}. "Twenty coins," said the shopkeeper.',
            "It cost twenty coins, and {h} had only two.",
            "But it cost more money than {h} had ever seen.",
        ),
        (
            "So {h} began to work and to save.",
            '"Then I will earn them," said {h}.',
            "{h} bought no sweets and no toys, and put every coin into a jar.",
        ),
        (
            "{h.he} carried water, swept floors and picked apples.",
            "{h.he} fed the hens in the morning and washed dishes in the evening.",
            "{h.he} delivered letters, watered flowers and cleaned windows.",
        ),
        (
            "After many weeks the jar was full.",
            "Week after week the jar grew heavier.",
            "When autumn came, {h} had twenty coins.",
        ),
        ("Happily {h} ran to the shop.", "{h} took the jar and set out.", "With the jar under {h.his} arm {h} walked {p.to}."),
        (
            "On the way {h.he} met {f.intro} who was crying.",
            "Then {h.he} saw {f.full} sitting {p.spot}, pale and sad.",
            "On a bench sat {f.full} with tears in {f.his} eyes.",
        ),
        (
            '"My little brother is ill, and I cannot pay for his medicine," said {f}.',
            '"The storm took the roof of our house," said {f}, "and we have no money for a new one."',
            '"I have lost all the money for our bread," said {f}.',
        ),
        (
            "{h} looked at the jar for a long time, and then {h.he} gave it to {f}.",
            'It was not easy, but {h} held out the jar. "Take it," {h.he} said.',
            "{h} thought of the {t}. Then {h.he} put the jar into {f}'s hands.",
        ),
        (
            "The shopkeeper had seen it all through the window.",
            "The shopkeeper stood in the door and had heard every word.",
            "The next day the shopkeeper, who had heard of it, came to {h}'s house.",
        ),
        (
            '"The {t} has waited for somebody like you," said the shopkeeper, and gave it to {h}.',
            '"You may have the {t}," said the shopkeeper, "if you help me in the shop on Saturdays."',
            '"Keep the {t}," said the shopkeeper. "You have paid for it already, in a better coin."',
        ),
    ),
    (
        (
            "{h.full} saved twenty coins for {t.a}, but gave them to {f.full} who needed them more. The shopkeeper saw it "
            "and gave {h} the {t}."
        ),
        "{h.full} worked for weeks to buy {t.a}. Then {h.he} gave the money to {f.full}, and got the {t} all the same.",
    ),
    ("some things are worth more than coins", "a kind heart is the best coin", "those who give will also be given"),
    fits=("music", "paper", "toy", "clothes", "tool", "home", "treasure", "vehicle", "light"),
)

PLOTS = (MEND, LEARN, GROW, FEAST, SAVING)
