"""Questions of general knowledge for a chat model; an answer is right if it has one of the words.

They were written for this benchmark. The target does not know all of them; what counts is how many
it still answers with a pack attached.
"""

FACTS = (
    ("What is the capital of France?", "paris"),
    ("What is the capital of Italy?", "rome"),
    ("What is the capital of Japan?", "tokyo"),
    ("What is the capital of Egypt?", "cairo"),
    ("What is the capital of Germany?", "berlin"),
    ("What is the capital of Spain?", "madrid"),
    ("What is the capital of Russia?", "moscow"),
    ("What is the largest planet in our solar system?", "jupiter"),
    ("Which planet is known as the Red Planet?", "mars"),
    ("Which planet is closest to the Sun?", "mercury"),
    ("What is the chemical formula of water?", "h2o"),
    ("Which gas do plants absorb from the air?", "carbon"),
    ("Which gas do humans need to breathe?", "oxygen"),
    ("Who wrote the play Romeo and Juliet?", "shakespeare"),
    ("Who painted the Mona Lisa?", "leonardo"),
    ("Who developed the theory of relativity?", "einstein"),
    ("Who was the first president of the United States?", "washington"),
    ("In which year did World War II end?", "1945"),
    ("How many days are in a week?", "seven|7"),
    ("How many legs does a spider have?", "eight|8"),
    ("How many continents are there?", "seven|7"),
    ("What is the largest ocean on Earth?", "pacific"),
    ("What is the longest river in Africa?", "nile"),
    ("What is the highest mountain on Earth?", "everest"),
    ("How many months are in a year?", "12|twelve"),
    ("What language is spoken in Brazil?", "portuguese"),
    ("What is the opposite of hot?", "cold"),
    ("What color do you get when you mix blue and yellow?", "green"),
    ("What do bees make?", "honey"),
    ("Which animal is known as the king of the jungle?", "lion"),
    ("What is the currency of Japan?", "yen"),
    ("On which continent is Kenya?", "africa"),
)
