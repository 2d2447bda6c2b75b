"""Plots about dangers, fears, journeys and rescues."""

from __future__ import annotations

from examples.demo_model.corpus.stories.plot import Plot

GUIDE = Plot(
    "guide",
    (
        (
            "{h} had {t.a} that {h.he} had got from {h.his} grandmother.",
            "In {h.his} home there was {t.a}.",
            "{h} owned {t.a}, and most people laughed at it.",
        ),
        (
            "{when} {h}'s friend {f.full} went {p.to} and did not come back.",
            "One evening {f.full}, {h}'s best friend, was still out {p.at} when the fog came.",
            "One evening a storm came up while {f.full}, {h}'s friend, was alone {p.at}.",
        ),
        (
            "The fog was so thick that nobody could see a hand before the eyes.",
            "It grew dark, and the wind began to howl.",
            "Black clouds covered the moon, and the path disappeared.",
        ),
        (
            '"{f} will never find the way home," said {o.a}.',
            '"It is too dangerous to go out now," said {o.a}.',
            "The neighbours stood together, and nobody knew what to do.",
        ),
        ("Then {h} thought of the {t}.", "{h} ran home and fetched the {t}.", '"Wait," said {h}. "I have my {t}."'),
        (
            "{h.he} climbed as high as {h.he} could and {signal}.",
            "{h} stood at the edge of the {p} and {signal}.",
            "{h.he} went out into the night and {signal}.",
        ),
        (
            "An hour passed, and nothing happened.",
            "{h.his} arms grew tired, but {h.he} did not stop.",
            "Again and again {h.he} did it, and waited, and listened.",
        ),
        (
            "Far away, {p.spot}, {f} lifted {f.his} head.",
            "{f} sat {p.spot}, cold and afraid. Then {f.he} noticed it.",
            "At that moment {f} was {p.spot}, and had almost lost hope.",
        ),
        (
            '"That is {h}\'s {t}!" {f.he} cried, and went towards it, step by step.',
            '"I know that {t}," thought {f}, and stood up.',
            "{f} followed it, over sticks and stones.",
        ),
        (
            "At last {f} came out of the dark and fell into {h}'s arms.",
            "Before midnight {f} was home, wet and tired, but safe.",
            "When {f} came near, everybody cheered.",
        ),
        (
            "Nobody laughed at the {t} any more.",
            '"Your {t} saved me," said {f}.',
            '"A small thing can be a great help," said {o.a}.',
        ),
    ),
    (
        "{f.full} was lost {p.at} in the dark. {h.full} {signal} until {f} found the way home.",
        "One night {h.full} went out with {h.his} {t} and {signal}. So {f.full}, who was lost, came home safely.",
    ),
    ("a small thing can be a great help", "one must never give up on a friend", "even a little light is enough in the dark"),
    fits=("light", "music"),
)

RESCUE = Plot(
    "rescue",
    (
        (
            "{h} always carried {t.a}.",
            "Wherever {h} went, {h.he} took {h.his} {t} along.",
            "{h} never left home without {h.his} {t}.",
        ),
        (
            '"Why do you always carry that {t}?" asked {f.full}.',
            '{h}\'s friend {f.full} laughed about it. "You will never need it," said {f}.',
            '"What is it good for?" asked {f.full}, {h.his} friend.',
        ),
        ('"One never knows," said {h}.', '{h} only smiled. "Wait and see," {h.he} said.', '"I do not know yet," answered {h}.'),
        ("{when} the two of them went {p.to}.", "{when} they walked together {p.at}.", "{when} they were playing {p.at}."),
        (
            "Suddenly the ground gave way, and {f} fell into a deep hole.",
            "{f} ran ahead, slipped, and slid down into a deep ditch.",
            "There was a cry. {f} had stepped on a rotten board and fallen into a pit.",
        ),
        (
            '"Help!" called {f}. "I cannot get out!"',
            "The walls were steep and wet, and {f} could not climb up.",
            '"Help me, please!" cried {f} from below.',
        ),
        (
            "{h}'s heart beat fast, but {h.he} stayed calm.",
            "For a moment {h} was frightened. Then {h.he} took a deep breath.",
            "{h} looked around. There was nobody to call.",
        ),
        (
            'Then {h.he} let down the {t}. "Hold on to it!" {h.he} called.',
            "{h.he} lay flat on the ground and held out the {t}.",
            '"Take hold of my {t}!" called {h}.',
        ),
        (
            "{f} held on, and {h} pulled with all {h.his} strength.",
            "{h} pulled and pulled, and little by little {f} came up.",
            "It was hard work, but {h} did not let go.",
        ),
        (
            "At last {f} sat on the grass, dirty and out of breath.",
            "With a last pull {f} was out.",
            "A moment later both lay on the grass and laughed.",
        ),
        (
            '"I will never laugh at your {t} again," said {f}.',
            '"Now I know what it is good for," said {f}.',
            "The next day {f} got one too.",
        ),
    ),
    (
        "{f.full} laughed at {h.full} for always carrying {t.a}. Then {f} fell into a hole, and {h} pulled {f.him} out with it.",
        "{p.at}, {f.full} fell into a pit. {h.full} saved {f.him} with {h.his} {t}.",
    ),
    ("it is good to be ready", "a calm head helps more than a loud voice", "one should not laugh too soon"),
    fits=(
        "rope",
        "ladder",
        "scarf",
        "blanket",
        "fishing rod",
        "net",
        "cloak",
        "shawl",
        "broom",
        "rake",
        "coat",
        "quilt",
        "shovel",
        "umbrella",
    ),
)

FEAR = Plot(
    "fear",
    (
        (
            "There was one thing that {h} was afraid of: at night a strange noise came from the {p}.",
            "Everybody said that something lived {p.at}, something big with yellow eyes.",
            "{h} never went {p.to} after dark, for people said that a monster lived there.",
        ),
        (
            "{when} {h} left {h.his} {t} {p.at}.",
            "{when} the wind carried {h}'s {t} right {p.to}.",
            "{when} {h} remembered: {h.his} {t} was still {p.at}!",
        ),
        ("It was getting dark.", "The sun had gone down already.", "Outside the first stars came out."),
        ('"I cannot go there alone," thought {h}.', "{h.his} knees began to shake.", "{h} wanted to hide under the bed."),
        (
            "But it was {h.his} favourite thing, and it looked like rain.",
            '"Being brave does not mean having no fear," {o.a} had once said.',
            "But {h.he} could not leave the {t} there all night.",
        ),
        ("So {h} set out, step by step.", "{h} took a deep breath and went.", "So {h.he} counted to ten and opened the door."),
        (
            "{p.at} it was very quiet. Then something moved {p.spot}.",
            "There it was, the noise! It came from {p.spot}.",
            "Two yellow eyes shone {p.spot}.",
        ),
        (
            '"Who is there?" asked {h} with a trembling voice.',
            "{h} wanted to run away, but {h.his} feet would not move.",
            '"I am not afraid of you!" called {h}, although it was not quite true.',
        ),
        (
            '"Please do not hurt me," said a thin voice. It was {f.intro}.',
            "Out came {f.intro}, who was shaking even more than {h}.",
            '"I thought that you were a monster," said {f.intro}, and came out.',
        ),
        (
            '"I cry at night because I am alone," said {f}.',
            '"I only sing because it is so dark," said {f}.',
            '"I was looking for something to eat," said {f}.',
        ),
        (
            "{h} had to laugh, and then {f} laughed too.",
            '"So you are the monster!" said {h}, and laughed.',
            "They sat down side by side, and neither was afraid any more.",
        ),
        (
            "{f} had found the {t} and kept it dry.",
            '"Is this {t} yours?" asked {f}.',
            "Together they found the {t} and went home.",
        ),
    ),
    (
        (
            "{h.full} was afraid of the noise {p.at}, but went there at night to fetch {h.his} {t}. The monster was only "
            "{f.full}, who was lonely."
        ),
        "Everybody feared the {p}. {h.full} went there for {h.his} {t} and found a new friend, {f.full}.",
    ),
    ("being brave means going although you are afraid", "most monsters are only lonely", "things look smaller when you go near"),
    fits=("light", "music", "paper", "toy", "clothes", "treasure", "vessel"),
    traits=("shy", "lonely", "dreamy", "kind", "curious", "honest", "cheerful"),
)

JOURNEY = Plot(
    "journey",
    (
        (
            "{when} {o.a} came to {h} with {t.a}.",
            "{when} {o.a} gave {h} {t.a} to carry.",
            "{when} {h} was called to {o.a}, and on the table there lay {t.a}.",
        ),
        (
            '"Take this {t} to {f.full} on the other side of the {p}," said {o}.',
            '"{f.full} lives beyond the {p} and needs this {t}," said {o}. "Will you take it there?"',
            '"My friend {f.full} waits for it beyond the {p}," said {o}.',
        ),
        (
            '"I will," said {h}, and set out at once.',
            "{h} had never been so far from home, but {h.he} nodded.",
            "{h} packed some bread and went.",
        ),
        (
            "First the way led up and up, until {h.his} legs hurt.",
            "The path was long and full of stones.",
            "At first the sun shone, and {h} sang as {h.he} walked.",
        ),
        (
            "Then it began to rain, and {h} put the {t} under {h.his} coat.",
            'At noon a merchant stopped {h.him}. "I will give you ten gold coins for that {t}," he said.',
            "By and by {h} came to two paths, and there was no sign.",
        ),
        (
            '"It is not mine to give away," said {h}, and went on.',
            '{h} did not turn back. "I have promised," {h.he} said.',
            '"A promise is a promise," thought {h}, and kept walking.',
        ),
        (
            "In the night {h.he} slept {p.spot} and held the {t} tight.",
            "When {h.he} was too tired to go on, {h.he} rested {p.spot}.",
            "{h.he} spent the night {p.spot}, under the stars.",
        ),
        (
            "The next day {h} saw smoke above the trees.",
            "In the morning {h.he} saw a small house with a green door.",
            "At last, on the other side of the {p}, there stood a little house.",
        ),
        (
            '{f} opened the door. "The {t}!" {f.he} cried. "I had almost given up hope."',
            '{f} came running. "You have brought the {t}!" {f.he} called.',
            "When {f} saw the {t}, {f.his} eyes filled with tears of joy.",
        ),
        (
            '"You must be hungry," said {f}, and there was hot soup and fresh bread.',
            "{h} stayed for {days} days, and they became good friends.",
            '"Nobody else would have come so far," said {f}.',
        ),
    ),
    (
        "{o.a} asked {h.full} to bring {t.a} to {f.full} beyond the {p}. The way was hard, but {h} kept {h.his} promise.",
        "{h.full} carried {t.a} past the {p}, through rain and night, and gave it to {f.full}, who had waited for it.",
    ),
    ("a promise is worth keeping", "every long way begins with one step", "one can do more than one thinks"),
    fits=("light", "music", "paper", "toy", "clothes", "vessel", "treasure", "magic", "garden", "food"),
    joy=False,
)

STORM = Plot(
    "storm",
    (
        (
            "{when} {h} and {h.his} friend {f.full} went out with {t.a}.",
            "{h} had {t.a}, and {when} {h.he} and {f.full} set out with it.",
            '{when} {h} said to {h.his} friend {f.full}, "Let us take the {t} and go {p.to}."',
        ),
        (
            "At first everything went well, and they laughed and sang.",
            "The world was wide and full of wonders.",
            "They travelled all morning and saw many new things.",
        ),
        (
            "But {p.at} the sky turned black.",
            "Then the wind rose, and the first drops fell.",
            "Suddenly there was thunder above the {p}.",
        ),
        ('"Hold on!" shouted {h}.', '"What shall we do?" cried {f}.', "The {t} shook, and {f} closed {f.his} eyes."),
        (
            "A great gust threw them to one side, and the {t} hit a rock.",
            "The rain was so heavy that they could see nothing.",
            "There was a loud crack: something on the {t} was broken.",
        ),
        (
            '"If we stay together, nothing will happen to us," said {h}.',
            '{h} took {f} by the hand. "Stay close to me," {h.he} said.',
            "{h} looked for shelter and saw a place {p.spot}.",
        ),
        (
            "They hid {p.spot} and waited.",
            "They hid {p.spot} and shared their last piece of bread.",
            "They found shelter {p.spot} and told each other stories.",
        ),
        (
            "After an hour the storm was over, and a rainbow stood in the sky.",
            "Little by little the thunder went away.",
            "In the morning the sun shone as if nothing had happened.",
        ),
        (
            "They mended the {t} with a branch and a piece of string.",
            "It took them half a day to mend the {t}.",
            "{f} held the {t}, and {h} mended it.",
        ),
        (
            "At dusk they came home, wet, hungry and happy.",
            "When they came home, everybody wanted to hear the story.",
            '"That was a real adventure," said {f} on the way home.',
        ),
    ),
    (
        (
            "{h.full} and {f.full} went out with {t.a} and came into a storm {p.at}. They hid {p.spot}, mended the {t}, "
            "and came home safely."
        ),
        "A storm surprised {h.full} and {f.full} {p.at}. They stayed together, and when the sun came out they mended their {t}.",
    ),
    ("together one can weather any storm", "after the rain comes the sun", "a good friend is the best shelter"),
    fits=("vehicle",),
)

PLOTS = (GUIDE, RESCUE, FEAR, JOURNEY, STORM)
SIGNALS = {
    "light": (
        "held up the {t} so that its light could be seen from far away",
        "swung the {t} to and fro",
        "let the {t} shine into the dark",
    ),
    "music": (
        "played the {t} as loudly as {h.he} could",
        "made the {t} sound into the night",
        "played on the {t}, the song that {f} loved most",
    ),
}
