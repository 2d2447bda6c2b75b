"""Plots about wishes, pride and prizes."""

from __future__ import annotations

from examples.demo_model.corpus.stories.plot import Plot

BOAST = Plot(
    "boast",
    (
        ("{h} had {t.a}, and {h.he} showed it to everyone.", "{when} {h} got {t.a}.", "{h} had won {t.a} at a fair."),
        (
            '"There is no finer {t} in the whole world," {h.he} said.',
            '"None of you has one like it," said {h} to the others.',
            '"Look at my {t}!" {h.he} called from morning to night.',
        ),
        (
            '{f.full} asked, "May I hold it for a moment?" "No," said {h}.',
            '{f.full}, who lived nearby, wanted to touch it. "You would only spoil it," said {h}.',
            '"It is nice," said {f.full}. "Nice?" cried {h}. "It is the best!"',
        ),
        (
            "Soon nobody wanted to play with {h}.",
            "After a while the others turned away when {h} came.",
            "The others began to go {p.to} without {h.him}.",
        ),
        (
            "{when} {h} walked with the {t} {p.to}, with {h.his} nose in the air.",
            "{when} {h} carried the {t} proudly {p.to}.",
            "So {h} went {p.to} alone, with nobody but the {t}.",
        ),
        (
            "{h.he} did not look where {h.he} was going, and fell into the mud.",
            "{h.he} looked only at the {t}, stumbled, and fell.",
            "There was a root on the path, and {h} did not see it. Down {h.he} went!",
        ),
        ("The {t} flew away and landed {p.spot}.", "The {t} rolled and rolled until it lay {p.spot}.", "And the {t} was gone."),
        (
            "{h} could not get up, for {h.his} foot hurt.",
            '"Help!" called {h}, but who should come?',
            "There {h} sat, dirty and alone.",
        ),
        (
            "But {f} had heard the fall, and came running.",
            "Then somebody held out a hand. It was {f}.",
            "It was {f} who came, and {f.he} did not laugh.",
        ),
        (
            "{f} helped {h.him} up and brought the {t}.",
            '"Lean on me," said {f}. "And here is your {t}."',
            "{f} cleaned {h}'s face and looked for the {t} until {f.he} found it.",
        ),
        (
            '"I was not nice to you," said {h}. "Would you like to hold it now?"',
            '{h} turned red. "You are finer than any {t}," {h.he} said.',
            '"Take it for a week," said {h}. "It is more fun with two."',
        ),
    ),
    (
        (
            "{h.full} boasted about {h.his} {t} until nobody wanted to play with {h.him}. When {h.he} fell, {f.full} "
            "helped, and {h} learned to share."
        ),
        "{h.full} was too proud of {t.a}. After a fall {p.at}, {f.full} brought it back, and {h} was ashamed.",
    ),
    ("pride is a lonely friend", "being kind is better than having fine things", "nobody is too small to help"),
    fits=("music", "toy", "clothes", "treasure", "paper", "vessel"),
    traits=("proud", "careless", "restless", "grumpy", "busy"),
)

TRADE = Plot(
    "trade",
    (
        (
            "{h} had {t.a}, but {h.he} did not want it any more.",
            '{when} {h} looked at {h.his} {t}. "I am tired of it," {h.he} said.',
            "{h} thought that {h.his} {t} was much too plain.",
        ),
        (
            "So {h.he} went {p.to} to trade it for something better.",
            "So {h} took it {p.to} to see what others would give for it.",
            "With the {t} {h} set out {p.to} to find something better.",
        ),
        (
            "First {h.he} met a farmer and got a fat goose for it.",
            "A merchant gave {h.him} a silver whistle for the {t}.",
            "A traveller wanted it at once and gave {h.him} a new pair of boots.",
        ),
        (
            "But soon it no longer pleased {h.him}, and {h} traded again.",
            "{h.he} was happy for an hour. Then {h.he} wanted something else.",
            "But before noon {h.he} traded again, for a big green hat.",
        ),
        (
            "Next {h.he} got a bag of nuts, and then a broken clock.",
            "By and by {h.he} owned a drum without a skin, and then only a piece of string.",
            "Each time the new thing was a little worse than the one before.",
        ),
        (
            "In the evening {h.he} sat {p.spot} with empty hands.",
            "When the sun went down, {h} had nothing left but an old nail.",
            "At dusk {h.he} sat {p.spot} and counted: nothing was left.",
        ),
        (
            '"How silly I was!" said {h}. "My {t} was just right for me."',
            "Now {h} missed the {t} more than anything.",
            "{h} thought of the {t} and wept a little.",
        ),
        (
            "Then {f.intro} came by, and what did {f.he} carry? The {t}!",
            "Along came {f.full}, and under {f.his} arm was the {t}.",
            '"Is this yours?" asked {f.intro}, and held up the {t}.',
        ),
        (
            '"I got it at the market," said {f}, "but I think that it belongs to you."',
            '"What will you give me for it?" asked {f}. "I have nothing," said {h}, "except a story."',
            '"Carry my bags home, and it is yours," said {f}.',
        ),
        (
            "{h} told {f} everything that had happened, and {f} laughed until {f.he} cried.",
            "And so {h} got back {h.his} {t}, and a friend besides.",
            "{h} held the {t} tight and never traded it again.",
        ),
    ),
    (
        "{h.full} traded {h.his} {t} for one thing after another until nothing was left. Luckily {f.full} brought it back.",
        "{h.full} wanted something better than {h.his} {t}. After a day of trading {p.at} {h.he} was glad to have it back.",
    ),
    ("what you have may be just right", "new is not always better", "one often sees the worth of a thing when it is gone"),
    fits=("light", "paper", "toy", "clothes", "tool", "vessel", "home", "vehicle"),
)

WISH = Plot(
    "wish",
    (
        (
            "{when} {h} found {t.a} {p.spot}.",
            "{o.a} left {h} {t.a}, and nobody knew what it could do.",
            "{when}, {p.at}, {h} bought {t.a} from {o.a}.",
        ),
        (
            'When {h} touched it, it spoke: "You have two wishes."',
            '"I can grant you two wishes," said a voice out of the {t}.',
            'It began to glow. "Say what you wish," it whispered, "but only twice."',
        ),
        (
            '"I wish for a mountain of sweets!" cried {h}.',
            '"I wish that everything I touch turns to cake," said {h}.',
            '"I wish to be bigger than anyone else," said {h} at once.',
        ),
        ("There was a flash, and so it was.", "The {t} glowed red, and it happened.", "And at once the wish came true."),
        ("At first {h} was very happy.", '"Wonderful!" laughed {h}.', "For an hour it was the best day of {h.his} life."),
        (
            "But soon {h} felt ill, and all was in disorder.",
            "But then {h} could not get through {h.his} own door.",
            "But nobody wanted to come near {h.him} any more.",
        ),
        (
            "{f.full}, {h}'s friend, came to visit and was frightened.",
            '"Is that really you?" asked {f.full}, and stepped back.',
            "Even {f.full}, {h.his} best friend, ran away.",
        ),
        ('"What have I done?" sighed {h}.', "{h} sat down and wept.", "Now {h} knew that it had been a foolish wish."),
        (
            "There was one wish left. {h} could have had gold, or a palace.",
            "{h} took the {t} once more and thought for a long time.",
            '"One wish is left," whispered the {t}. "Think well."',
        ),
        (
            '"I wish that everything was as before," said {h}.',
            '"I want to be just as I was," {h.he} said at last.',
            '"Make it all undone," said {h}. "I have everything that I need."',
        ),
        (
            "The {t} glowed once more, and then it was dark and cold.",
            "A soft wind blew, and all was as it had been.",
            "When {h} opened {h.his} eyes, {f} stood there and laughed.",
        ),
        (
            '"Shall we go {p.to}?" asked {f}. And that was all that {h} wanted.',
            "{h} put the {t} away and went out to play with {f}.",
            "{h} ate a plain piece of bread with {f}, and it tasted wonderful.",
        ),
    ),
    (
        (
            "{h.full} found {t.a} that granted two wishes. The first wish was foolish, and the second undid it. {h} was "
            "glad, and so was {f.full}."
        ),
        "A voice in {t.a} gave {h.full} two wishes. With the last one {h.he} wished that everything was as before.",
    ),
    ("one should think before one wishes", "having enough is a kind of magic", "one can be happy with what one has"),
    fits=("magic", "treasure", "light", "vessel"),
    joy=False,
)

CONTEST = Plot(
    "contest",
    (
        (
            "{when} there was a great race {p.at}, and the prize was {t.a}.",
            "Every year there was a race {p.at}. This time the winner was to get {t.a}.",
            '{when} a sign said: "Race today {p.at}. First prize: {t.a}."',
        ),
        ("{h} wanted that {t} more than anything.", '"I will win that {t}," said {h}.', "{h} had practised for {days} weeks."),
        (
            "{f.full} ran too, and was very fast.",
            "The fastest of all was {f.full}.",
            '"You have no chance," laughed {f.full}, who had won the year before.',
        ),
        (
            '"Ready, steady, go!" called {o.a}.',
            "{o.a} dropped a flag, and off they went.",
            "A bell rang, and they all began to run.",
        ),
        (
            "At first {h} was last, but then {h.he} passed one after the other.",
            "{h} ran as fast as {h.his} legs would go.",
            "Soon only {f} and {h} were in front.",
        ),
        (
            "Then {f} stumbled {p.spot} and did not get up.",
            "Suddenly there was a cry. {f} had fallen {p.spot}.",
            "But just before the end {f} fell and hurt {f.his} foot.",
        ),
        (
            "{h} could see the finish and the {t}.",
            "The way to the {t} was free now.",
            '"Run!" shouted the people. "You can win!"',
        ),
        (
            "But {h} stopped, turned round and went back.",
            "{h} thought for the blink of an eye. Then {h.he} turned back.",
            "But {h.he} could not leave {f} lying there.",
        ),
        (
            "{h.he} helped {f} up, and arm in arm they walked to the finish.",
            '"Put your arm around me," said {h}, and together they went on.',
            "{h} carried {f} the rest of the way.",
        ),
        (
            "They were the last of all, but the people cheered louder than for the winner.",
            "They came in last, and everybody stood up and clapped.",
            "Another had won long ago, but nobody looked at the winner.",
        ),
        (
            '"The prize is for the best," said {o.a}, and gave the {t} to {h}.',
            'The winner came to {h}. "I think that this {t} is yours," the winner said.',
            "In the evening {f} brought {h} {t.one} that {f.he} had made.",
        ),
    ),
    (
        (
            "{h.full} wanted to win {t.a} in a race {p.at}. When {f.full} fell, {h} turned back to help, and got the {t} "
            "all the same."
        ),
        "In a race for {t.a}, {h.full} stopped to help {f.full}. They came in last, but everybody cheered.",
    ),
    ("helping is better than winning", "there are prizes that nobody can see", "a friend is worth more than a prize"),
    fits=("music", "toy", "treasure", "food", "vehicle", "paper", "clothes"),
)

PLOTS = (BOAST, TRADE, WISH, CONTEST)
