"""Plots about things that are lost, found, hidden, borrowed and looked for."""

from __future__ import annotations

from examples.demo_model.corpus.stories.plot import Plot

PORTABLE = ("light", "music", "paper", "toy", "clothes", "tool", "vessel", "treasure", "magic")
MADE = ("light", "music", "toy", "vessel", "vehicle")

LOST = Plot(
    "lost",
    (
        (
            "{h} had {t.a}, and {h.he} took it everywhere.",
            "More than anything else, {h} loved {h.his} {t}.",
            "{h} owned one beautiful thing: {t.a}.",
            "On {h.his} last birthday {h} had been given {t.a}.",
        ),
        (
            "{when} {h} went {p.to} and came home without the {t}.",
            "{when} the {t} was gone.",
            "{when}, after a long walk {p.at}, {h.ref} saw that the {t} was missing.",
        ),
        (
            "{h} looked {p.spot}, but it was not there.",
            "First {h.he} searched {p.spot}. There was nothing but dust and leaves.",
            "{h.he} ran back and looked {p.spot}, but found nothing.",
            "{h.ref} turned over every stone, and still the {t} was nowhere.",
        ),
        ("", "{h} sat down and began to cry.", '"What shall I do without my {t}?" sighed {h}.', "{h.his} heart grew heavy."),
        (
            'Then {f.intro} came along. "Why are you so sad?" asked {f}.',
            '{f.intro} heard {h.him} and stopped. "What is wrong?" asked {f}.',
            'Just then {f.intro} passed by. "Can I help you?" asked {f}.',
        ),
        (
            '"I have lost my {t}," said {h}.',
            '"My {t} is gone," answered {h}, "and I have looked everywhere."',
            "{h} told {f} about the {t}.",
        ),
        (
            '"Four eyes see more than two," said {f}. "Let us look together."',
            '"Do not worry," said {f}. "We will find it."',
            '"Where were you when you had it last?" asked {f}. {h} thought hard.',
        ),
        (
            "They searched slowly, step by step, and at last they looked {p.other}.",
            "{f} went left and {h} went right, until they met {p.other}.",
            "Together they walked the whole way again. Then {f} pointed to something {p.other}.",
        ),
        (
            "There lay the {t}, just as it had fallen.",
            "And there it was: the {t}, a little dirty, but whole!",
            '"Here it is!" cried {f}, and held up the {t}.',
        ),
        (
            "{h} laughed with joy and thanked {f}.",
            "{h} hugged {f} and danced in a circle.",
            '"Thank you," said {h}. "I would never have found it alone."',
        ),
    ),
    (
        "{h.full} lost {h.his} {t} {p.at}. {f.full} helped {h.him} to look for it. They found it {p.other}, and became friends.",
        (
            "One day {h.intro} could not find {h.his} {t}. Together with {f.full} {h.he} searched {p.at}, and there it "
            "was, {p.other}."
        ),
    ),
    ("two find more than one", "it is good to ask for help", "a good friend is worth more than gold"),
    fits=PORTABLE,
)

OWNER = Plot(
    "owner",
    (
        (
            "{when} {h} was walking {p.at} when {h.he} saw something {p.spot}.",
            "{when} something {p.spot} caught {h}'s eye.",
            "{when} {h} stumbled over something {p.spot}.",
        ),
        ("It was {t.a}.", "{h.he} picked it up. It was {t.a}!", "It was {t.a}, and nobody was near."),
        (
            '{h} liked the {t} very much. "May I keep it?" {h.he} wondered.',
            '"How beautiful!" said {h}. "I wish it were mine."',
            "For a moment {h} wanted to hide the {t} and tell nobody.",
        ),
        (
            "But somebody must be missing it.",
            "But then {h.he} thought of the one who had lost it.",
            '"But somewhere somebody is looking for it," {h.he} said.',
        ),
        (
            'So {h} went from door to door and asked, "Is this your {t}?"',
            "{h} asked everybody {h.he} met, but the {t} belonged to none of them.",
            "{h.he} asked the neighbours one after the other. All of them shook their heads.",
        ),
        (
            "",
            "{h} grew tired, but {h.he} did not give up.",
            "The sun was already low.",
            '"One more house," {h} said to {h.him}self.',
        ),
        (
            "At the last house {o.a} opened the door.",
            "At last {h.he} came to {o.a}.",
            "Then {h.he} met {o.a} who was searching the ground.",
        ),
        (
            '"My {t}!" cried {o}. "I have looked for it for {days} days."',
            'When {o} saw the {t}, {o.he} began to weep with joy. "It was my mother\'s," {o.he} said.',
            '"You have found my {t}!" called {o}. "I thought that I would never see it again."',
        ),
        (
            "{o} gave {h} a warm supper and told {h.him} the story of the {t}.",
            "To thank {h}, {o} baked {h.him} a large cake.",
            "{o} asked {h} to come and visit as often as {h.he} liked. And {h} did, every week.",
        ),
    ),
    (
        (
            "{h.full} found {t.a} {p.spot}. {h.he} asked everybody whose it was. It belonged to {o.a}, who was so glad "
            "that {h.he} was invited to supper."
        ),
        "{h.intro} found {t.a} {p.at}. {h.he} wanted to keep it, but gave it back to {o.a}, and won a friend.",
    ),
    ("what you give back comes back as joy", "being honest makes friends", "it feels good to do what is right"),
    fits=PORTABLE,
    joy=False,
)

BORROWED = Plot(
    "borrowed",
    (
        (
            "{h} had a neighbour, {f.full}, who owned {t.a}.",
            "{h}'s best friend was {f.full}, and {f} had {t.a}.",
            "Next door lived {f.intro}. {f} had {t.a}, and {f.he} was proud of it.",
        ),
        (
            '{when} {h} asked, "May I borrow your {t}?"',
            '"Will you lend me your {t}?" asked {h} {when}.',
            "{when} {h} asked to borrow the {t} for a trip {p.to}.",
        ),
        (
            '"Yes," said {f}, "but bring it back tomorrow."',
            '"Of course," said {f}. "I will need it tomorrow."',
            "{f} said yes, and {h} promised to bring it back the next day.",
        ),
        (
            "{h} took the {t} {p.to} and had a wonderful time.",
            "{h} spent a happy day {p.at} with the {t}.",
            "All day long {h} used the {t} {p.at}.",
        ),
        (
            "But on the way home {h.he} forgot it {p.spot}.",
            "When evening came, {h.he} went home and left the {t} {p.spot}.",
            "Then it began to rain, {h} ran home, and the {t} stayed {p.spot}.",
        ),
        (
            'The next morning {f} knocked at the door. "May I have my {t} back?" asked {f}.',
            "The next day {f} came for the {t}.",
            "The next morning {f} stood at the door and asked for the {t}.",
        ),
        (
            '{h} turned red. "I am sorry," {h.he} said. "I have left it behind."',
            '{h} wanted to tell a lie, but {h.he} did not. "I forgot it," {h.he} said.',
            "{h} felt ashamed, and told {f} everything.",
        ),
        (
            '{f} was sad, but {f.he} said, "Then let us go and get it."',
            '"Thank you for telling me the truth," said {f}. "We will look for it together."',
            "{f} was silent for a while. Then {f.he} took {h}'s hand, and they set out.",
        ),
        (
            "They found the {t} {p.spot}, wet, but not broken.",
            "There was the {t}, {p.spot}, as if it had waited for them.",
            "{h} ran ahead and found the {t} {p.spot}.",
        ),
        (
            "{h} cleaned the {t} until it looked like new, and gave it back.",
            '{h} dried it carefully and handed it to {f}. "It will not happen again," said {h}.',
            '"A promise is a promise," said {h}, "and next time I will keep mine."',
        ),
    ),
    (
        "{h.full} borrowed {t.a} from {f.full} and forgot it {p.at}. {h.he} told the truth, and they found it together.",
        "{f.full} lent {h.full} {t.a}. {h} left it {p.spot}, felt sorry, and brought it back.",
    ),
    ("a promise must be kept", "the truth is better than a good excuse", "what is borrowed needs twice the care"),
    fits=PORTABLE,
    joy=False,
)

TREASURE_HUNT = Plot(
    "treasure hunt",
    (
        (
            "{when} {h} found an old piece of paper in a bottle.",
            "{when} a piece of paper blew in through the window.",
            "{when} {h} opened an old book, and a piece of paper fell out.",
        ),
        (
            "On it was drawn a line that led {p.to}, and at its end a cross.",
            'It said: "Go {p.to} and look {p.spot}."',
            "It showed the {p}, and a red cross.",
        ),
        (
            "{h} showed it to {f.full}, {h.his} best friend.",
            '{h} ran to {f.intro} who lived next door. "Look!" cried {h}.',
            '"I cannot do this alone," said {h}, and went to fetch {f.full}.',
        ),
        (
            '"It must be gold," said {f}.',
            '"A treasure!" called {f}. "We shall be rich."',
            '{f}\'s eyes shone. "When do we start?" asked {f}.',
        ),
        (
            "They packed bread and water and went {p.to}.",
            "They set out at once, and in an hour they were {p.at}.",
            "The way {p.to} was long, and they sang as they walked.",
        ),
        (
            "First they looked {p.other}, but found only a sleepy beetle.",
            "They looked {p.other}. Nothing!",
            "They dug and dug, and found a shoe, a bone and a nail.",
        ),
        (
            '"Let us read it once more," said {h}.',
            '"We are holding the paper upside down," laughed {h}.',
            "{f} wanted to give up, but {h} did not.",
        ),
        (
            "Then they looked {p.spot}, and there stood a wooden box.",
            "At last they searched {p.spot}, and something hard knocked against {h}'s hand.",
            "And {p.spot} they found a bundle of cloth.",
        ),
        (
            "In it there was no gold, but {t.a}.",
            "Inside lay {t.a}, and nothing else.",
            "They opened it slowly. Inside was {t.a}!",
        ),
        (
            'A note said: "For two good friends."',
            '"It is better than gold," said {h}.',
            "{f} and {h} looked at each other and laughed.",
        ),
        (
            "They agreed to share the {t}, one week each.",
            "They carried the {t} home together.",
            '"It belongs to both of us," said {f}.',
        ),
    ),
    (
        "{h.full} and {f.full} found an old note and followed it {p.to}. {p.spot} lay {t.a}. They shared it.",
        "A piece of paper led {h.full} and {f.full} {p.to}. There was no gold there, but {t.a}, and they were happy with it.",
    ),
    ("the search can be better than the treasure", "sharing makes everything better", "friends find more than gold"),
    fits=PORTABLE,
)

MYSTERY = Plot(
    "mystery",
    (
        (
            "{h} kept {t.a} on the windowsill.",
            "{h} had {t.a} that stood beside the door.",
            "{h} owned {t.a} and put it in the same place every night.",
        ),
        (
            "But {when} it was not where it should be.",
            "{when} the {t} was gone, and at noon it was back again.",
            "But {when} the {t} lay on the other side of the room.",
        ),
        (
            "The next day it happened again.",
            "The same thing happened the next night, and the night after.",
            "For {days} days it was the same.",
        ),
        (
            '"Who takes my {t}?" wondered {h}.',
            '"How strange!" said {h}. "{t.one} cannot walk."',
            '{h} asked {o.a} for advice. "Stay awake and watch," said {o}.',
        ),
        (
            "That night {h} hid behind the curtain and waited.",
            "That night {h} did not sleep. {h.he} sat in the dark and listened.",
            "So {h} lay down, closed {h.his} eyes, and only pretended to sleep.",
        ),
        (
            "At midnight the door opened, very slowly.",
            "After a long time there was a small noise.",
            "When the clock struck twelve, soft steps came across the floor.",
        ),
        ("It was {f.intro}!", "In came {f.intro}.", "A shadow came in, and {h} saw that it was {f.full}."),
        (
            "{f} took the {t} and carried it {p.to}. {h} followed.",
            "{f.he} picked up the {t} and went off {p.to}, and {h} went after {f.him}.",
            "Quietly {h} followed {f} and the {t} {p.to}.",
        ),
        (
            "There, {p.spot}, sat {f}'s little sister, who was ill and could not sleep without it.",
            "There, {p.spot}, {f} showed the {t} to three small children who had nothing to look at.",
            "There, {p.spot}, lay {f}'s old mother, who smiled when she saw the {t}.",
        ),
        (
            '"I am sorry," said {f}. "I was too shy to ask."',
            'When {f} saw {h}, {f.he} was frightened. "I always bring it back," said {f}.',
            '"Please do not be angry," whispered {f}.',
        ),
        (
            '"You only had to ask," said {h}. "From now on we will go together."',
            '{h} was not angry at all. "Keep the {t} as long as you need it," {h.he} said.',
            '{h} smiled. "Tomorrow I will come too," {h.he} said, "and bring some cake."',
        ),
    ),
    (
        (
            "Every night {h.full}'s {t} disappeared. {h.he} stayed awake and saw {f.full} take it {p.to}, for somebody who "
            "needed it. {h} was not angry."
        ),
        "Somebody took the {t} of {h.full} every night. It was {f.full}, who was too shy to ask. From then on they shared it.",
    ),
    ("one should ask before being angry", "things are often kinder than they seem", "asking is easier than hiding"),
    fits=("light", "music", "paper", "toy", "clothes", "treasure", "home", "magic"),
    joy=False,
)

PLOTS = (LOST, OWNER, BORROWED, TREASURE_HUNT, MYSTERY)
