# ruff: noqa: E501
"""The plots of the generated stories, as templates for `grammar.expand`.

Knows: text. A plot is a list of beats; a beat is a tuple of alternatives; each is one paragraph.
Slots: hero/he/him/his, friend/fhe/fhim/fhis, elder/ehe/ehim/ehis, place, home, thing, treat,
animal, weather, trait. Does not know how the slots are filled.
"""

from __future__ import annotations

OPENINGS: tuple[str, ...] = (
    "[Once upon a time|Long ago|Many years ago], there [was|lived] a {trait} [child|young person] named {hero}. {hero} lived in {home} with {his} {elder}. [Every morning|Each day], {he} [went to|walked to|visited] {place} [before breakfast|as soon as the sun was up|with a small bag on {his} back].",
    "{hero} was [a {trait} child|the most {trait} child in the whole village|known for being {trait}]. {He} lived in {home}, [not far from {place}|a short walk from {place}], and {his} best friend was {friend}.",
    'It was a {weather} [morning|afternoon|day], and {hero} [had nothing to do|was looking out of the window|sat at the kitchen table]. {Friend} [knocked on the door|came by|called from the street]. ["Do you want to go to {place}?" {fhe} asked.|"Come outside with me!" {fhe} said.|"Let us walk to {place}," {fhe} said with a smile.]',
    "[On a {weather} day|One {weather} morning|One {weather} afternoon], {hero} and {friend} [went|walked|set out] to {place}. They [took {treat} and a bottle of water|brought {treat} for lunch|carried {treat} in a basket] and [talked all the way|sang a song on the way|counted the birds in the trees].",
    "There was once [a small house|a little shop|a quiet street] near {place}, and [there|that is where] {hero} lived with {his} {elder}. {hero} was {trait}[| and never bored| and loved to ask questions]. {He} had [many|a few good] friends, and the best of them was {friend}.",
    "{hero} [liked|loved] {place} more than any other place. [It was quiet there|There was always something new to see|The air smelled of grass and water], and {he} could [think|play|dream] for hours. On this {weather} day {he} was not alone. {Friend} had come along, [and {fhe} had brought {treat}|carrying {treat}|for the first time].",
)

PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lost": (
        (
            '{hero} had a(n) {thing} that {he} [carried everywhere|loved very much|had got from {his} {elder}]. But that day, when {he} [put a hand in {his} pocket|opened {his} bag|looked around], the {thing} was gone. "Oh no!" {he} [cried|said]. "I have lost it!"',
            "At noon {hero} [noticed|saw] that {his} {thing} was missing. {He} [looked under the bench|emptied {his} bag|turned out all {his} pockets], but it was not there. {hero} felt [sad|very worried|like crying].",
        ),
        (
            '"Do not worry," said {friend}. "[We will find it together|Let us go back the way we came|Tell me where you saw it last]." So they [searched the path|looked behind every tree|walked slowly and looked at the ground]. They found [a button and two coins|an old shoe|a feather and a smooth stone], but no {thing}.',
            '{Friend} [thought for a moment|put an arm around {him}]. "[Where did you have it last?|When did you last use it?]" {fhe} asked. {hero} tried to remember. "[By the old bridge|Near the well|Under the big oak]," {he} said. They [ran|hurried|went] there at once.',
        ),
        (
            'Then they heard a small sound. A(n) {animal} was sitting [in the grass|on a stone|under a bush], and [next to it|between its feet|right beside it] lay the {thing}! "[It kept it safe for me|Look, it has found my {thing}]," {hero} laughed. {He} gave the {animal} a piece of {treat} to say thank you.',
            'At last {friend} [pointed|shouted]. The {thing} was [hanging on a branch|lying in the tall grass|half hidden under the leaves]! {hero} [jumped for joy|picked it up and held it tight|was so happy that {he} danced]. "Thank you," {he} said. "I could not have found it without you."',
        ),
        (
            "From then on, {hero} [took better care of|always kept an eye on] the {thing}. And [when a friend lost something|whenever someone needed help], {he} was the first to help look for it.",
            'That evening {hero} told {his} {elder} the whole story. "[A good friend is worth more than any {thing}|Things can be lost, but friends stay]," said {his} {elder}, and {hero} [nodded|agreed].',
        ),
    ),
    "animal": (
        (
            "Near {place} they heard a [soft|sad|strange] sound. It was a small {animal}. [It was stuck in a fence|It had hurt its leg|It was alone and cold|It was caught in a net], and it looked at them with big eyes.",
            'Suddenly {hero} stopped. "[Shh|Be quiet|Wait]," {he} whispered. "[There is something in the bushes|Do you hear that?]" They looked, and there was a little {animal}. It was [shaking with fear|too weak to stand|wet and hungry].',
        ),
        (
            '"[We must help it|We cannot leave it here|It needs us]," said {hero}. {He} [wrapped the {animal} in {his} coat|moved slowly so that it would not be afraid|spoke to it in a low voice], while {friend} [ran to get {his} {elder}|fetched some water|held the branches apart].',
            '{Friend} was [a little afraid|not sure what to do], but {hero} [knelt down|was calm]. "[Do not be scared, little one|We are your friends]," {he} said. Very carefully, {he} [lifted the {animal} up|set the {animal} free|gave it some water to drink].',
        ),
        (
            "They [took it home|carried it to the house of {hero}'s {elder}] and made a bed in a box. Every day they gave it [fresh water and food|milk and soft bread|a little {treat}]. [Day by day|Slowly], the {animal} grew strong again.",
            '{hero}\'s {elder} knew what to do. {Ehe} [cleaned the wound|warmed some milk|made a bed of straw] and said, "[It needs rest|Give it time|It will be well in a few days]." {hero} and {friend} [sat with it all evening|came to see it every day after school].',
        ),
        (
            'When the {animal} was well, they [brought it back to {place}|opened the box by the edge of the wood]. It [looked back once|stood still for a moment] and then [ran off|disappeared between the trees]. {hero} was [sad and happy at the same time|proud]. "Goodbye," {he} said. "[Come and visit us|Take care]."',
            "After two weeks the {animal} was healthy. It did not want to leave! It [followed {hero} to school|slept at the foot of the bed|waited at the gate every day], and so it stayed, and {hero} had a new friend.",
        ),
    ),
    "learn": (
        (
            'More than anything, {hero} wanted to learn how to [swim|ride a bicycle|play the flute|bake bread|paint|skate|whistle]. {He} had tried [once|twice|many times], but it [never worked|always went wrong]. "I will never learn it," {he} said.',
            "{Friend} could [juggle three balls|climb the tallest tree|draw beautiful horses|play the drum], and {hero} wanted to do it too. But the first try [went badly|ended on the ground|made everyone laugh], and {hero} [wanted to give up|felt foolish].",
        ),
        (
            '{His} {elder} [smiled|sat down beside {him}]. "[Nobody can do it on the first day|When I was young, I failed a hundred times|Everything is hard before it is easy]," {ehe} said. "[Try a little every day|Start slowly|Do one small step at a time]."',
            '"[Watch me|I will show you]," said {friend}. "First you [take a deep breath|stand very still|watch closely]. Then you [try it slowly|count to three|begin]. [If it goes wrong, you laugh and try again|Do not think about falling]."',
        ),
        (
            "So {hero} practiced [every day|every evening|before and after school]. [On the first day it was hard.|The first week was the hardest.] [On the second day it was a little better.|Then, slowly, it got better.] [Some days {he} was tired, but {he} did not stop.|{Friend} came to watch and clapped {fhis} hands.]",
            "{hero} tried again and again. {His} [arms|legs|hands] hurt, and [it rained|the days were short], but {he} [kept going|did not stop]. [After a week|After many days], something changed. It was not so hard anymore.",
        ),
        (
            'And then one {weather} day, it worked! "[Look at me|I can do it|Did you see that]!" {hero} shouted. {Friend} [cheered|laughed and clapped]. {hero} had learned that [practice is stronger than luck|patience makes hard things easy|it is fine to fail, as long as you try again].',
            'At the summer fair, {hero} [showed everyone what {he} had learned|stood in front of the whole village]. {His} hands were shaking at first, but [then it went well|everything went right]. {His} {elder} was [so proud|smiling in the first row]. "You did not give up," {ehe} said.',
        ),
    ),
    "storm": (
        (
            '[All at once|Suddenly|Before long], the sky [turned dark|grew black]. [The wind began to blow|Thunder rolled over the hills|The first big drops fell]. "[A storm is coming|We have to find shelter|We must go inside]!" called {friend}.',
            'In the afternoon the wind [became stronger and stronger|changed]. {hero} looked up and saw [heavy gray clouds|a wall of dark clouds|lightning far away]. {He} took {friend} by the hand. "[Run|Quick, come with me]!" {he} said.',
        ),
        (
            "They ran until they found [an old barn|a small cave|an empty hut|a dry place under a rock]. There they sat close together and [listened to the rain|watched the lightning|shared the {treat}]. {Friend} was [afraid of the thunder|cold], so {hero} [told {fhim} a story|sang a song|gave {fhim} {his} scarf].",
            'The rain [fell like a curtain|was loud on the roof]. {hero} [counted the seconds between lightning and thunder|held the lantern], just as {his} {elder} had taught {him}. "[It is moving away|It will be over soon]," {he} said, and {friend} [felt better|stopped shaking].',
        ),
        (
            'When the storm was over, [a rainbow stood over {place}|the air was fresh and clean|everything was shining]. But a [big branch|tree] had fallen [across the path|on the fence of an old neighbor]. "[Let us clear the way|We can help]," said {hero}, and they [worked until sunset|pulled and pushed together].',
            "At last the sun came out again. The two friends [walked home through the puddles|stepped outside]. On the way they found [a bird's nest that had fallen down|a small {animal} that had lost its way|a neighbor whose gate was broken]. Of course, they stopped to help.",
        ),
        (
            '{hero}\'s {elder} was [waiting at the door|glad to see them]. There was [hot soup|warm tea|dry clothes and {treat}] for both of them. "[You were brave|I am glad you stayed together]," {ehe} said.',
            "That night {hero} lay in bed and thought about the day. [Storms come and go|Even the longest rain ends], {he} thought, [but it is good not to be alone|and after every storm the sky is wider than before]. Then {he} fell asleep.",
        ),
    ),
    "gift": (
        (
            "The birthday of {hero}'s {elder} was [coming soon|the next day], and {hero} had no gift. {He} [counted {his} coins|looked into {his} money box]. There were only [three coins|four coins|a few small coins]. That was not enough for [anything in the shop|a real present].",
            "{hero} wanted to give {friend} something special. [But what?|It was not an easy thing.] {He} looked at [all the shops|the market], but everything was [too big, too small, or too expensive|not quite right].",
        ),
        (
            '{He} walked to {place} to think. There {he} saw [some smooth stones|wild flowers|pieces of colored glass|soft wood], and {he} had an idea. "[I will make something myself|I do not need money for that]!" {he} said.',
            '"[The best gifts are made by hand|You could make something]," said an old [man|woman] at the market, and gave {hero} [a bit of string and some paper|a small piece of wood|some yarn]. "Here, start with this."',
        ),
        (
            "{hero} worked [all afternoon|for three days|until it was dark]. {He} [cut and painted|glued and tied|carved and polished], and [once {he} hurt {his} finger|twice {he} had to start again]. In the end {he} had made a beautiful {thing}.",
            "It took [a long time|many hours]. {hero} made mistakes, [laughed about them|sighed], and tried again. Finally the {thing} was ready. It was [not perfect|a little crooked], but it was [full of love|different from all the others].",
        ),
        (
            '"[This is the best gift I have ever had|Did you make this yourself? It is wonderful]!" And the {thing} [got a place on the shelf by the window|was never put away]. {hero} smiled. {He} had learned that [a gift does not have to be expensive|what counts is the thought].',
            'When the day came, {hero}\'s heart beat fast. [The paper was opened.|Slowly, the ribbon was untied.] Then there was a big smile and a long hug. "[I will keep it forever|How did you know that I wanted this?]"',
        ),
    ),
    "mystery": (
        (
            'That week strange things happened. [Every night|Each morning], {treat} disappeared from the kitchen. "[It was not me|I did not take it]," said {hero}. "[But I will find out who did it|Somebody must have done it]."',
            "In the evening {hero} heard [a knock on the wall|a scratching sound in the attic|soft steps on the roof]. [There it was again!|It stopped, and then it came back.] {hero} was [curious|a bit afraid, but also curious].",
        ),
        (
            "{Friend} came over with [a lamp|a notebook|a magnifying glass]. They [put flour on the floor|tied a bell to the door|hid behind the sofa] and waited. [Nothing happened for a long time.|The clock struck nine, then ten.] {Friend} almost fell asleep.",
            '"[Let us look for clues|A good detective looks first and talks later]," said {friend}. They found [small marks on the floor|some crumbs by the window|a tuft of hair on a nail]. The trail led [to the garden|up the stairs|behind the stove].',
        ),
        (
            "Then they saw it. It was not a thief and not a ghost. It was a(n) {animal}! It [sat in a corner with its young ones|looked just as surprised as they were|had made a nest in an old hat]. {hero} and {friend} [began to laugh|looked at each other and smiled].",
            'Suddenly [the bell rang|the door moved]. {hero} held up the light, and there stood {his} {elder} with [a plate in {ehis} hand|a red face]. "[I was hungry|I could not sleep]," {ehe} said. "[You caught me|So now you know]." All three of them laughed.',
        ),
        (
            'The mystery was solved. [{hero} wrote it all down in a notebook|They told the story at school the next day], and on the first page it said: "[Look closely before you judge|Most secrets are smaller than they sound]."',
            "From that day on, {hero} and {friend} were [the detectives of the street|known as the best detectives in town]. When [a cat was missing|a key was lost|something odd happened], people [came to them first|knocked on their door].",
        ),
    ),
    "garden": (
        (
            'In spring, {hero} got a small bag of seeds from {his} {elder}. "[Plant them and be patient|Good things take time]," {ehe} said. {hero} [dug a row of holes behind the house|found a sunny corner], put the seeds in the ground, and gave them water.',
            'Behind the house was a piece of land where nothing grew but [weeds|thorns]. "[This could be a garden|Let us plant something here]," said {hero}. {Friend} [brought a shovel|was not so sure], but they started the same day.',
        ),
        (
            'The next morning {hero} ran outside. [Nothing.|There was nothing to see.] On the second day, nothing. After a week {he} [was angry|was disappointed]. "[The seeds are no good|It does not work]," {he} said. "[Wait a little longer|Seeds do their first work in the dark]," said {his} {elder}.',
            "It was hard work. They [pulled out the weeds|carried away the stones], and their hands [got dirty|were sore]. It did not rain for [ten days|two weeks], so every evening they carried water from the [well|stream].",
        ),
        (
            "Then, one {weather} morning, there was [a tiny green leaf|a row of small green dots]. {hero} [called everyone to come and see|could not believe {his} eyes]. The plants grew [taller every day|as high as {his} knees, then as high as {his} head].",
            'One day a(n) {animal} came and [ate some of the leaves|sat between the plants]. {hero} wanted to chase it away, but {friend} said, "[It is only hungry|There is enough for all]." So they [built a small fence|left one corner of the garden for it].',
        ),
        (
            "In autumn the garden was full of [tomatoes, beans, and pumpkins|carrots and sunflowers|flowers in every color]. They [gave some to the neighbors|sold some at the market|made a big pot of soup for the whole street]. Nothing had ever tasted so good.",
            'By the end of summer, people stopped at the fence to look. "[How did you do that?|What a beautiful garden!]" they asked. "[With water, work, and a lot of waiting|One seed at a time]," said {hero}.',
        ),
    ),
    "race": (
        (
            "[Every year|In the first week of summer] there was a race [around the lake|from the church to the old mill|through the village]. {hero} wanted to [win|take part]. But [a fast boy named Rex|a tall girl named Tess] had won it [three times in a row|every year].",
            '"[There will be a boat race on Sunday|The kite contest is next week]," said {friend}. "The winner gets a(n) {thing}." {hero}\'s eyes [lit up|grew wide]. "[We have to be there|Let us try it together]!"',
        ),
        (
            "They trained [every day|in sun and rain]. {Friend} [kept the time|gave advice|cheered]. {hero} got [faster|better], but [never fast enough, {he} thought|{he} was still nervous].",
            'The day of the contest came. [Flags waved in the wind|The whole village was there|A band played]. {hero}\'s heart [was beating fast|beat like a drum]. "[Ready, set, go|Three, two, one, go]!" someone shouted, and off they went.',
        ),
        (
            "Halfway there, {hero} saw that [another child|the strongest of them all] had fallen [and was crying|and could not get up]. {hero} looked at the finish line. Then {he} [stopped|turned around] and [helped the child to stand|gave the child a hand]. The others ran past.",
            'In the last part {hero} was [second|third]. {He} was [tired|out of breath], but {he} heard {friend} shout, "[You can do it|Keep going]!" {He} [took one more deep breath|closed {his} eyes] and gave everything {he} had.',
        ),
        (
            '{hero} did not win [that day|the race]. But [the people clapped louder for {him} than for the winner|everyone knew what {he} had done]. "[There are more important things than being first|You are a winner to me]," said {friend}. And that felt [better than any prize|very good].',
            'It was close, so close that [nobody was sure who had won|the judge had to think for a long time]. "[It is a tie|Two winners this year]," the judge said at last. {hero} [laughed and shook hands with everyone|shared the prize gladly].',
        ),
    ),
    "kitchen": (
        (
            '"[Today we will bake a cake|I want to cook something for everyone|Let us make soup]," said {hero}. {His} {elder} [gave {him} an apron|showed {him} the old recipe book]. The recipe said: [two cups of flour, three eggs, and a little salt|six carrots, two onions, and a pot of water].',
            'The guests would come at six, and [there was nothing to eat|the table was still empty]. "[I will cook|Leave it to me]," said {hero}. {Friend} [raised an eyebrow|laughed]. "Have you ever cooked before?" "No," said {hero}, "but [I can read|how hard can it be?]"',
        ),
        (
            "They [mixed and stirred|cut and peeled]. {Friend} [broke an egg on the floor|spilled the milk], and {hero} [took salt instead of sugar|forgot the oven]. There was flour [everywhere|on the table, on the chairs, and even on the cat].",
            'At first everything went well. Then [the pot boiled over|smoke came out of the oven|the bowl fell down with a crash]. "[Oh dear|What now]," said {hero}. {He} [opened the window|wiped the floor] and [thought|took a deep breath].',
        ),
        (
            '"[We start again|That was only the first try]," said {hero}. This time they [read every line twice|worked slowly and carefully]. {Friend} [measured|washed the bowls], and {hero} [stirred|watched the clock]. Soon the kitchen smelled [wonderful|of warm bread|sweet].',
            'Just then {his} {elder} [came in|looked through the door]. {Ehe} did not [scold them|get angry]. {Ehe} [rolled up {ehis} sleeves|tasted a spoonful] and said, "[It only needs a little help|Not bad at all]." Together they [saved what could be saved|finished it].',
        ),
        (
            'In the evening they all sat around the table. [Everyone asked for more|Not a crumb was left]. "[Who made this?|This is delicious]," asked the guests. {hero} and {friend} [looked at each other and grinned|bowed].',
            'It was [a little burnt|not very pretty], but it tasted [good|better than it looked]. "[Next time we will make two|Tomorrow I will try bread]," said {hero}. "[Next time you will also wash the dishes|First clean the kitchen]," said {his} {elder}, and everyone laughed.',
        ),
    ),
    "journey": (
        (
            'One day a letter came from {hero}\'s aunt, who lived [by the sea|in the city|on the other side of the mountains]. "[Come and visit me|I have something to show you]," it said. {hero} [packed a bag|put {treat} and a blanket into a bag], and {friend} [came along|asked if {fhe} could come too].',
            '{hero} had always wondered what was behind the hills. "[Let us find out|Today we go and look]," {he} said. {Friend} [nodded|was ready at once]. They took {treat}, [a map|a rope and a map], and [told {hero}\'s {elder} where they were going|left when the sun came up].',
        ),
        (
            "The road was [long|dusty]. They crossed [a wooden bridge|two rivers] and walked through [a dark forest|fields of wheat|a valley full of mist]. At noon they [rested under a tree|met a farmer with a cart, who took them a part of the way].",
            'After some hours they came to a place where the road split. There was no sign. "[Left or right?|Which way now?]" asked {friend}. {hero} [looked at the sun|studied the map|saw a(n) {animal} running to the left]. "This way," {he} said.',
        ),
        (
            'In the afternoon they [were lost|did not know where they were]. {Friend} [sat down on a stone|was close to tears]. "[Listen|Wait]," said {hero}. Far away they heard [a bell|the sound of water|someone singing]. They followed the sound and [found the road again|came to a small house].',
            'An old woman [gave them water|let them rest by her fire]. "[It is not far anymore|Follow the river and you cannot go wrong]," she said. They thanked her and [gave her some of their {treat}|promised to visit her again].',
        ),
        (
            'When they reached the top, they stood still. Before them lay [the sea, blue and wide|a valley with a hundred lights|a lake as clear as glass]. "[It was worth every step|I have never seen anything so beautiful]," said {hero}. They sat there until the stars came out.',
            'At last they arrived. {hero}\'s aunt [opened the door with a smile|ran to meet them]. They [ate and talked until late|told her about the road]. "[The best part of a journey is the road itself|You have come a long way]," she said. And that night they slept [well|like stones].',
        ),
    ),
}

LINKS: tuple[str, ...] = (
    "[The next day|A few days later|The following week], {hero} met {friend} again [near {place}|at the corner|in front of the house].",
    "[Some time passed.|Weeks went by.] Then, on a {weather} morning, a new adventure began.",
    "[But that was not the end|That was not all]. [Soon after|Only two days later], {hero} and {friend} [were out again|had new plans].",
    "When [autumn|winter|spring|summer] came, {hero} was [a little older|a bit taller] and still just as {trait}.",
)

ENDINGS: tuple[str, ...] = (
    "And so the day ended [well|with a smile]. {hero} and {friend} were tired and happy.",
    "{hero} never forgot that day.",
    '"[What will we do tomorrow?|Same time tomorrow?]" asked {friend}. {hero} only smiled.',
    "The moon rose over {place}, and [all was quiet|everyone slept].",
    "The end.",
)
