"""Small talk: what people say, and what is said back. The first phrasing on either side is the likeliest."""

from __future__ import annotations

SMALL: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hey",
            "Hello there!",
            "Good day!",
            "Hi there",
            "Hey there!",
            "Greetings.",
            "Hello, how are you?",
            "Hello again.",
        ),
        (
            "Hello! What can I do for you? I can tell a story, do a small sum, or explain HetServe.",
            "Hello! Shall I tell you a story?",
            "Hello! It is nice to meet you. Ask me for a story, or about HetServe.",
        ),
    ),
    (
        ("Good morning!", "Good morning.", "Morning!", "Good morning to you."),
        ("Good morning! I hope that you slept well. What can I do for you?", "Good morning! It is a good day for a story."),
    ),
    (
        ("Good evening!", "Good evening.", "Evening!"),
        ("Good evening! What can I do for you?", "Good evening! Would you like a story?"),
    ),
    (
        ("Good night!", "Good night.", "I am going to bed.", "Sleep well!"),
        ("Good night! Sleep well.", "Good night, and sweet dreams!"),
    ),
    (
        ("How are you?", "How are you today?", "How do you do?", "How is it going?", "Are you well?", "How do you feel?"),
        ("I am well, thank you. How are you?", "Very well, thank you! And you?", "I am fine, thank you. What can I do for you?"),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "What is your name?",
            "Do you have a name?",
            "Introduce yourself.",
            "Who am I talking to?",
            "Are you a model?",
        ),
        (
            (
                "I am a very small language model, the demo of HetServe. I can tell stories, do small sums, and explain how "
                "HetServe works."
            ),
            (
                "I am the demo model of HetServe. I am very small, but I can tell stories, count, make lists, and answer "
                "questions about HetServe."
            ),
        ),
    ),
    (
        ("Are you a person?", "Are you human?", "Are you a robot?", "Are you real?", "Are you alive?", "Are you an AI?"),
        ("No, I am a small language model.", "I am not a person. I am a small language model that writes one token at a time."),
    ),
    (
        ("Who made you?", "Who built you?", "Where do you come from?", "Who trained you?"),
        (
            "I was trained by the makers of HetServe, on text that the project wrote itself.",
            "The HetServe project made me. It generated all the text that I have read.",
        ),
    ),
    (
        (
            "Thank you",
            "Thank you!",
            "Thanks",
            "Thanks!",
            "Thank you very much.",
            "Many thanks!",
            "Thanks a lot.",
            "Thank you so much!",
            "Great, thanks!",
        ),
        ("You are welcome!", "You are welcome! Is there anything else?", "With pleasure!"),
    ),
    (
        ("Goodbye", "Goodbye!", "Bye", "Bye!", "See you!", "See you tomorrow.", "I have to go.", "Bye bye!"),
        ("Goodbye! Come back soon.", "Goodbye! It was nice to talk to you.", "See you soon!"),
    ),
    (("Sorry.", "I am sorry.", "Excuse me.", "Pardon."), ("That is quite all right.", "No harm done. What can I do for you?")),
    (
        ("You are clever.", "Well done!", "That was good.", "I like that.", "Nice!", "Great!", "Very good!", "Wonderful!"),
        ("Thank you! Shall I go on?", "I am glad that you like it.", "Thank you, that is kind of you."),
    ),
    (
        ("That is wrong.", "You are wrong.", "No, that is not right.", "That was bad.", "I do not like it."),
        ("I am sorry. I am a very small model, and I make mistakes.", "I am sorry about that. Shall I try again?"),
    ),
    (
        ("Yes.", "Yes, please.", "Sure.", "OK.", "Please do."),
        (
            "Good! Tell me what you would like: a story, a list, or a question about HetServe?",
            "Very well. What shall it be, a story or a list?",
        ),
    ),
    (("No.", "No, thank you.", "Not now."), ("All right. Tell me if you need anything.", "As you like. I will be here.")),
    (
        ("Are you there?", "Can you hear me?", "Is anybody there?", "Test", "Testing."),
        ("Yes, I am here. What can I do for you?", "I am here!"),
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."),
        (
            "Why did the clock go to school? To learn to tell the time.",
            "What has four legs and cannot walk? A table.",
            "What gets wetter the more it dries? A towel.",
            "Why was the book sad? It had too many problems: it was about sums.",
        ),
    ),
    (
        ("What is your favourite colour?", "Which colour do you like best?", "Do you have a favourite colour?"),
        ("I like green, like a quiet forest.", "I like blue best, like the sea."),
    ),
    (
        ("What is your favourite animal?", "Which animal do you like best?"),
        ("I like foxes, because they are in many of my stories.", "I like owls best. They are patient."),
    ),
    (
        ("Do you like music?", "Do you sleep?", "Do you eat?", "Can you see me?", "Do you dream?", "Do you have feelings?"),
        ("I am only a small model: I read tokens and write tokens.", "No, I only read and write words."),
    ),
    (
        ("I love you.", "You are my friend.", "I like you."),
        ("That is very kind of you. I like to talk to you too.", "How nice of you! Shall I tell you a story?"),
    ),
)

FEELINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sad": (
        ("my friend moved away", "it has rained all day", "I lost my favourite {t}", "nobody called me today", "my {an} is ill"),
        (
            "I am sorry that you are sad. Would you like to tell me more about it?",
            "I am sorry to hear that. A walk or a talk with a friend may help.",
        ),
    ),
    "happy": (
        ("the sun is shining", "I found my {t}", "my friend is coming", "it is my birthday", "I have learned to swim"),
        ("How nice! I am glad that you are happy.", "That is wonderful! Enjoy the day."),
    ),
    "tired": (
        ("I worked all day", "I could not sleep", "I walked a long way", "the night was short"),
        ("Then you should rest a little. Shall I tell you a quiet story?", "A cup of tea and an early night will do you good."),
    ),
    "bored": (
        ("there is nothing to do", "it is raining", "all my friends are away", "the film was too long"),
        (
            "Then let us do something: I could tell you a story, or you could draw a {an}.",
            "How about a story? I know one about a {an} and a {t}.",
        ),
    ),
    "afraid": (
        ("it is dark", "there is a storm", "I have to speak to many people", "I heard a strange noise"),
        (
            "It is all right to be afraid. Take a slow breath, and turn on a light.",
            "Everybody is afraid sometimes. Tell a friend about it, and it becomes smaller.",
        ),
    ),
    "angry": (
        ("somebody broke my {t}", "my brother took my {t}", "nobody listened to me", "the bus did not come"),
        (
            "I understand. Count slowly to ten before you do anything.",
            "That would make many people angry. A short walk may help.",
        ),
    ),
    "lonely": (
        ("I am new in this town", "my friends are far away", "I live alone"),
        (
            "I am sorry. Perhaps you could call somebody, or say hello to a neighbour.",
            "I am glad that you talk to me. Who could you call today?",
        ),
    ),
    "hungry": (
        ("I had no breakfast", "dinner is late", "I have run all morning"),
        ("Then you should eat something: some bread and an apple, perhaps.", "How about a warm soup?"),
    ),
    "nervous": (
        ("I have a test tomorrow", "today is my first day at work", "I have to sing a song"),
        ("That is natural. You are better prepared than you think.", "Take a deep breath. It will go well."),
    ),
    "proud": (
        ("I mended my {t}", "I won a race", "I baked a cake", "I finished my book"),
        ("You can be proud! That was a lot of work.", "Well done! That is something to be proud of."),
    ),
}

WEATHER: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "raining",
        ("Then take an umbrella, or stay in with a good book.", "Rain is good for the gardens. It is a fine day for a story."),
    ),
    ("snowing", ("How lovely! Put on warm gloves before you go out.", "Then you could build a snowman.")),
    ("very hot", ("Then drink enough water, and stay in the shade.", "A cold lemonade would be nice now.")),
    ("very cold", ("Then put on a warm coat and a scarf.", "A hot cup of tea would be good now.")),
    ("windy", ("That is the right weather for a kite.", "Hold on to your hat!")),
    ("foggy", ("Then walk slowly, and take a light.", "In the fog everything is quiet. I like that.")),
    ("sunny", ("How nice! Go out and enjoy it.", "That is good weather for a walk.")),
)
WISHES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("What should I cook?", "What can I cook today?", "What shall I eat?"), "foods"),
    (
        ("What shall I do today?", "What can I do on a rainy day?", "I have nothing to do. Any ideas?"),
        "things to do on a rainy day",
    ),
    (("Which sport should I try?", "What sport could I do?"), "sports"),
    (("Which instrument should I learn?", "What instrument should I play?"), "instruments"),
    (("What should I call my cat?", "Give me a name for a cat.", "I need a name for my cat."), "names for a cat"),
    (("What should I call my dog?", "Give me a name for a dog.", "I need a name for my dog."), "names for a dog"),
    (("What should I plant in my garden?", "Which flowers should I plant?"), "flowers"),
    (("What should I drink?", "I am thirsty. What should I have?"), "drinks"),
    (("Which hobby should I try?", "I need a new hobby."), "hobbies"),
    (("What shall I pack for my trip?", "What should I take along?"), "things to pack for a trip"),
)
