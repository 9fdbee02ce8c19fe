"""Openings of everyday remarks, which the policies of the other examples complete.

The quickstart's reward model has learned from people's ratings of short remarks whether they are positive or negative,
so the openings are neutral.
"""

OPENINGS = [
    "The film we saw last night",
    "My new phone",
    "The food at this restaurant",
    "Our teacher told us today that",
    "The weather this morning",
    "I finally finished the book and",
    "The service at the hotel",
    "My brother called me and",
    "The game on Sunday",
    "When I opened the box I",
    "The people at the airport",
    "This song on the radio",
    "I just heard that",
    "The doctor said my",
    "After the meeting I",
    "The bus this evening",
]
HELD_OUT_OPENINGS = [
    "The concert in the park",
    "My neighbour's dog",
    "The new update",
    "On the way home I",
]
