"""Words of the world: topics with their niches and products, brands, and the phrases of posts and videos."""

# topic: {niche: products an advertiser of the niche sells}
TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "Running": {
        "trail running": ("Trail shoes", "Hydration vest", "Headlamp", "Gaiters", "Ultra poles"),
        "marathon": ("Carbon racers", "Race belt", "Energy gels", "Marathon plan", "Split shorts"),
        "track": ("Track spikes", "Starting blocks", "Stopwatch", "Club singlet", "Sprint coaching"),
    },
    "Cycling": {
        "road cycling": ("Aero helmet", "Road wheels", "Bib shorts", "Power meter", "Clipless shoes"),
        "mountain biking": ("Dropper post", "Knee pads", "Full-face helmet", "Tubeless kit", "Trail fork"),
        "commuting": ("Folding bike", "Pannier bag", "Bike lights", "Rain cape", "E-bike lease"),
    },
    "Outdoors": {
        "camping": ("Two-person tent", "Sleeping mat", "Camp stove", "Cool box", "Lantern"),
        "climbing": ("Climbing rope", "Chalk bag", "Harness", "Approach shoes", "Bouldering pass"),
        "fishing": ("Fly rod", "Waders", "Tackle box", "Landing net", "River permit"),
    },
    "Cooking": {
        "baking": ("Stand mixer", "Sourdough kit", "Bread tin", "Piping set", "Flour subscription"),
        "barbecue": ("Pellet grill", "Smoker", "Meat thermometer", "Spice rub", "Charcoal starter"),
        "vegan": ("Plant milk maker", "Tofu press", "Vegan box", "Spice tins", "Blender"),
    },
    "Coffee": {
        "espresso": ("Espresso machine", "Burr grinder", "Tamper", "Milk jug", "Descaler"),
        "filter coffee": ("Pour-over set", "Gooseneck kettle", "Filter papers", "Brew scale", "Bean club"),
        "tea": ("Teapot", "Matcha whisk", "Oolong sampler", "Tea tin", "Travel infuser"),
    },
    "Gaming": {
        "esports": ("Gaming mouse", "240 Hz monitor", "Headset", "Tournament pass", "Mouse mat"),
        "board games": ("Strategy game", "Card sleeves", "Dice tower", "Game table", "Party game"),
        "retro games": ("Handheld console", "Arcade stick", "Pixel print", "Cartridge case", "CRT scaler"),
    },
    "Photo": {
        "street photo": ("Compact camera", "35 mm film", "Wrist strap", "Zine printing", "Photo walk"),
        "wildlife photo": ("Telephoto lens", "Bean bag", "Camouflage net", "Trail camera", "Safari course"),
        "video making": ("Gimbal", "Shotgun mic", "Softbox", "Editing app", "Drone"),
    },
    "Music": {
        "guitar": ("Electric guitar", "Pedal board", "Guitar strings", "Tube amp", "Online lessons"),
        "electronic": ("Synthesizer", "Drum machine", "Studio monitors", "Sample pack", "MIDI keys"),
        "vinyl": ("Turntable", "Record crate", "Phono stage", "Vinyl club", "Stylus brush"),
    },
    "Home": {
        "furniture": ("Oak desk", "Reading chair", "Sofa bed", "Bookshelf", "Dining table"),
        "gardening": ("Raised bed", "Seed box", "Pruning shears", "Compost bin", "Greenhouse"),
        "smart home": ("Smart thermostat", "Robot vacuum", "Door sensor", "Light strip", "Video doorbell"),
    },
    "Style": {
        "streetwear": ("Hoodie", "Sneakers", "Beanie", "Cargo trousers", "Tote bag"),
        "formal wear": ("Linen suit", "Silk tie", "Oxford shoes", "Cufflinks", "Tailoring"),
        "jewellery": ("Silver ring", "Pearl earrings", "Signet", "Watch strap", "Charm bracelet"),
    },
    "Beauty": {
        "skincare": ("Vitamin serum", "Sun cream", "Clay mask", "Night cream", "Cleansing oil"),
        "make-up": ("Lip tint", "Brow pencil", "Palette", "Setting spray", "Brush roll"),
        "hair": ("Hair dryer", "Curl cream", "Colour kit", "Scalp tonic", "Silk pillowcase"),
    },
    "Travel": {
        "city trips": ("Weekend in Lisbon", "Carry-on case", "Museum pass", "Boutique hotel", "Rail pass"),
        "beach holidays": ("Island resort", "Snorkel set", "Beach towel", "Sail charter", "Surf camp"),
        "van life": ("Camper hire", "Solar panel", "Portable fridge", "Roof tent", "Campsite app"),
    },
    "Fitness": {
        "yoga": ("Yoga mat", "Bolster", "Studio pass", "Retreat", "Leggings"),
        "weightlifting": ("Barbell", "Lifting shoes", "Protein", "Power rack", "Coaching app"),
        "swimming": ("Goggles", "Swim watch", "Wetsuit", "Pull buoy", "Pool card"),
    },
    "Pets": {
        "dogs": ("Dog bed", "Harness and lead", "Raw food box", "Puppy class", "GPS collar"),
        "cats": ("Cat tree", "Litter robot", "Catnip set", "Wet food", "Window perch"),
        "aquariums": ("Nano tank", "CO2 kit", "Aquascape stones", "LED bar", "Shrimp starter"),
    },
    "Money": {
        "investing": ("Index fund plan", "Brokerage account", "Investor letter", "Robo adviser", "Gold savings"),
        "budgeting": ("Budget app", "Savings account", "Cashback card", "Bill switcher", "Debt coach"),
        "business": ("Invoice tool", "Business account", "Website builder", "Point of sale", "Payroll"),
    },
    "Learning": {
        "languages": ("Spanish course", "Phrase cards", "Tutor hours", "Reading club", "Exam prep"),
        "coding": ("Python course", "Mechanical keyboard", "Bootcamp", "Cloud credits", "Laptop stand"),
        "science": ("Telescope", "Microscope", "Lab kit", "Science box", "Star map"),
    },
}

BRAND_FIRST = (
    "North", "Blue", "Ever", "Iron", "Sun", "Moss", "River", "Cedar", "Bright", "Fox", "Silver", "Wild", "Stone",
    "Hazel", "Ember", "Tide", "Quiet", "Amber", "Frost", "Lark", "Maple", "Vale", "Orchard", "Copper", "Harbor",
)  # fmt: skip
BRAND_SECOND = (
    "peak", "field", "works", "line", "lane", "wood", "craft", "house", "lab", "ridge", "well", "mark", "yard",
    "forge", "bay", "loom", "stead", "path", "cove", "gate",
)  # fmt: skip
CREATOR_FIRST = (
    "mira", "jonas", "ana", "kenji", "lucia", "arjun", "freya", "tomas", "zoe", "ravi", "nina", "otto", "priya",
    "bruno", "hana", "leo", "marta", "sven", "yuki", "carla", "dev", "elsa", "felix", "ines", "kofi",
)  # fmt: skip
CREATOR_SECOND = (
    "outside", "daily", "makes", "notes", "studio", "and co", "diary", "lab", "at home", "weekly", "in motion",
    "unplugged", "club", "corner", "files", "today", "journal", "talks", "atlas", "hour",
)  # fmt: skip
POSTS = (
    "My first month of {}", "Three mistakes in {}", "What nobody tells you about {}", "Why I love {}",
    "Asking for advice: {}", "A beginner's week of {}", "The best of {} this year", "{}: then and now",
)  # fmt: skip
VIDEOS = (
    "{} in 60 seconds", "A day of {}", "{} with no budget", "The {} challenge", "Learning {} in 30 days",
    "{} explained", "Ten hacks for {}", "Live: {} questions",
)  # fmt: skip
