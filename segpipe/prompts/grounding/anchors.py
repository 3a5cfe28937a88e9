"""Concepts that a phrase may be nearer to than to any class: general words, in groups under a hypernym.

A sentence encoder puts "water bottle" near the class "water", and "kidney" nowhere near a land cover's
classes but near *something*. A phrase belongs to a class only if it is nearer to the class than to all of
these. They come from general lists (the categories of COCO, the structures of TotalSegmentator, the
lexicographer files of WordNet), from what is seen outdoors, and from the fitting half of
tests/prompts/phrases.csv. No word of its other half is in here (a test says so); the same people wrote both.
"""

from __future__ import annotations

_GROUPS = """
animal: insect, bird, fish, dog, cat, horse, sheep, cow, elephant, bear, zebra, giraffe, rodent,
  ape, livestock, wild animal, reptile, shellfish, pet, feather, fur, reef
person: crowd, child, worker, politician, athlete, resident, government, profession, company
vehicle: boat, motorcycle, train, aircraft, lorry, spacecraft, wheel, engine, excavator, warship
food: fruit, vegetable, meat, pizza, cake, cereal, flour, banana, apple, broccoli, carrot, hot dog,
  donut, dairy product
drink: beverage, coffee, wine, beer
household object: chair, couch, bed, dining table, toilet, sink, refrigerator, oven, toaster,
  microwave, bottle, wine glass, cup, fork, knife, spoon, vase, book, clock, scissors, teddy bear,
  hair drier, toothbrush, toy, furniture, bathroom fixture, plumbing, wooden furniture
clothing: shoe, hat, backpack, umbrella, handbag, tie, suitcase, jewellery
electronics: television, laptop, computer mouse, remote control, keyboard, telephone, camera,
  battery
tool: machine, hammer, rope, container of liquid, weapon
sports equipment: frisbee, snowboard, kite, baseball bat, skateboard, surfboard, tennis racket, game
material: plastic, glass, paper, metal, rubber, cloth, chemical, fuel, gas, brick, plank of wood,
  substance
story: word, music, painting, number, idea, law, money, feeling, event, time, quantity, shape,
  communication, possession, motive
body organ: spleen, gallbladder, stomach, pancreas, adrenal gland, lung, oesophagus, trachea,
  thyroid, small bowel, duodenum, colon, prostate, tissue, cell, skin, eye, ear, tooth, nerve,
  cerebellum, ventricle, disease
skeleton: bone, vertebra, sacrum, humerus, scapula, clavicle, femur, hip, rib, sternum, cartilage,
  skull, muscle, joint of the skeleton
blood: artery, vein, aorta, vena cava, blood circulation, lymph node
weather: storm, hail, mist, haze, air pollution, smoke, sky, hurricane, thunder
fire: flame, explosion, burning
outer space: sun, moon, star, planet, galaxy, asteroid
ice: polar ice cap, icicle
natural disaster: flood, earthquake, eruption, landslide, drought
landform: hill, ridge, valley, gorge, cavern, crater, rock, boulder, hot spring, arid wilderness
installation: power station, power line, antenna, pipeline, drilling platform, fire hydrant, parking
  meter, bench, road sign, signal, tower, castle, statue, fence, church, stadium, sewer
wood industry: sawmill, carpentry
"""


def _parse(text: str) -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    for line in text.replace("\n  ", " ").strip().splitlines():
        head, _, members = line.partition(":")
        groups[head] = tuple(member.strip() for member in members.split(","))
    return groups


ANCHORS: dict[str, tuple[str, ...]] = _parse(_GROUPS)
"""Hypernym: its hyponyms. The hypernym is an anchor too."""
